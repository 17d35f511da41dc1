"""How far a pretrained model's fingerprints lie apart: by rounding, and by wrong weights."""

from __future__ import annotations

from statistics import fmean

import pytest

from cluster.engines.weight_sync import POLICY_TOLERANCE, odd_ones
from tests.fingerprints import fingerprint, load_policy, with_noisy_layer
from tests.pretrained import smollm2

pytestmark = pytest.mark.slow


def test_rounding_is_accepted_and_one_wrong_layer_of_thirty_is_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = smollm2()
    exact = fingerprint(load_policy(path), path)
    half = {
        attention: fingerprint(load_policy(path, dtype="bfloat16", attention=attention), path)
        for attention in ("sdpa", "eager")
    }
    wrong = {
        share: fingerprint(with_noisy_layer(load_policy(path), share), path)
        for share in (0.03, 0.1, 0.3)
    }
    rows = {
        "bfloat16": (half["sdpa"], exact),
        "bfloat16, two kernels": (half["eager"], half["sdpa"]),
        **{f"a layer with {share:.0%} noise": (said, exact) for share, said in wrong.items()},
    }
    with capsys.disabled():
        print()
        for name, (one, other) in rows.items():
            apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
            print(f"{name}: mean {fmean(apart):.3f}, largest {max(apart):.3f}")
    assert max(abs(a - b) for a, b in zip(*half.values(), strict=True)) > POLICY_TOLERANCE
    assert odd_ones({"policy-0": exact, **half}, tolerance=POLICY_TOLERANCE) == {}
    for share in (0.1, 0.3):
        said = {"policy-0": exact, **half, "wrong": wrong[share]}
        assert list(odd_ones(said, tolerance=POLICY_TOLERANCE)) == ["wrong"]
