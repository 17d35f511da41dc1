"""Placements that cannot be met, explained."""

from __future__ import annotations

from cluster.machines.placement import Ask, NodeResources, explain


def node(
    name: str = "n1", *, free: dict[str, float] | None = None, **total: float
) -> NodeResources:
    return NodeResources(name=name, total=total, free=total if free is None else free)


POLICY = Ask(name="policy replica", bundle={"GPU": 1, "CPU": 2}, count=4)


def test_what_fits_needs_no_word() -> None:
    assert explain([POLICY], [node(GPU=4, CPU=8)]) == []
    assert explain([POLICY], [node("a", GPU=2, CPU=8), node("b", GPU=2, CPU=4)]) == []
    ranks = Ask(name="rank of a policy replica", bundle={"GPU": 1}, count=8)
    assert explain([ranks], [node("a", GPU=4), node("b", GPU=4)]) == []
    assert explain([], []) == []
    assert explain([Ask(name="coordinator", bundle={"CPU": 0})], []) == []


def test_fractions_that_fill_a_gpu_fit() -> None:
    shares = Ask(name="replica", bundle={"GPU": 0.1}, count=10)
    assert explain([shares], [node(GPU=1)]) == []


def test_resource_nobody_has_is_named() -> None:
    (sentence,) = explain([POLICY], [node(CPU=64, **{"node:10.0.0.1": 1, "memory": 2e9})])
    assert sentence == (
        "policy replica (4 x 1 GPU, 2 CPU): no node has GPU; the cluster has CPU, memory."
    )


def test_bundle_larger_than_every_node_is_named_with_the_largest_node() -> None:
    ask = Ask(name="learner", bundle={"GPU": 8, "CPU": 2})
    (sentence,) = explain([ask], [node("a", GPU=4, CPU=64), node("b", GPU=2, CPU=64)])
    assert sentence == (
        "learner (8 GPU, 2 CPU): 8 GPU, 2 CPU on one node is asked, "
        "the node with most GPU has 4 (a)."
    )


def test_resources_that_lie_on_different_nodes_are_told_apart() -> None:
    ask = Ask(name="replica", bundle={"GPU": 1, "CPU": 16})
    (sentence,) = explain([ask], [node("a", GPU=4, CPU=2), node("b", CPU=64)])
    assert sentence.endswith("each is there, but on no node together.")


def test_more_than_the_cluster_holds_is_counted() -> None:
    (sentence,) = explain([POLICY], [node("a", GPU=2, CPU=8), node("b", GPU=1, CPU=8)])
    assert sentence == (
        "policy replica (4 x 1 GPU, 2 CPU): only 3 fit beside the rest of what is asked, by first "
        "fit; the cluster has 3 GPU on 2 nodes and 16 CPU on 2 nodes."
    )


def test_asks_compete_for_the_same_nodes() -> None:
    learner = Ask(name="learner", bundle={"GPU": 2})
    (sentence,) = explain([POLICY, learner], [node(GPU=4, CPU=64)])
    assert sentence.startswith("policy replica (4 x 1 GPU, 2 CPU): only 2 fit beside the rest")


def test_waiting_for_others_is_no_lack() -> None:
    busy = node(GPU=4, CPU=64, free={"GPU": 1, "CPU": 60})
    (sentence,) = explain([POLICY], [busy])
    assert sentence == (
        "policy replica (4 x 1 GPU, 2 CPU): 3 of them wait until others give back what they hold; "
        "the cluster has 4 GPU on 1 node, 1 of them free and 64 CPU on 1 node, 60 of them free."
    )


def test_one_impossible_ask_does_not_hide_another_that_waits() -> None:
    never = Ask(name="bootstrap policy", bundle={"GPU": 16})
    first, second = explain([never, POLICY], [node(GPU=4, CPU=64, free={"GPU": 0, "CPU": 64})])
    assert first.startswith("bootstrap policy") and "has 4 (n1)" in first
    assert second.startswith("policy replica") and "4 of them wait until others" in second


def test_cluster_without_nodes_says_so() -> None:
    assert explain([POLICY], []) == ["policy replica (4 x 1 GPU, 2 CPU): the cluster has no node."]
