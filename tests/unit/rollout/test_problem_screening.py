from __future__ import annotations

import pytest

from rollout.problems.screening import MAX_TEXT, Reason, screen


@pytest.mark.parametrize(
    ("problem", "answer", "reason"),
    [
        ("How many?", "3", None),
        ("How long is AB? ![](https://cdn.mathpix.com/x)", "3", Reason.IMAGE),
        ("See https://x.org/a.PNG. How long?", "3", Reason.IMAGE),
        ("In <img_3362> AB = 2. Find CD.", "3", Reason.IMAGE),
        ("In <image_1> AB = 2. Find CD.", "3", Reason.IMAGE),
        ("Find all x with <imagine>.", "3", None),
        ("How long is AB? [asy] draw(A--B); [/asy] as shown in the figure", "3", None),
        ("As shown in the figure, AB = 2. Find CD.", "3", Reason.FIGURE),
        ("In Fig. 3 the angle is 20. Find the other.", "3", Reason.FIGURE),
        ("A figure has 3 sides. How many?", "3", None),
        ("Prove that $a^2 \\ge 0$.", "proof", Reason.PROOF),
        ("Show that a = b.", None, Reason.PROOF),
        ("Find all n and prove that there are no others.", "3", None),
        ("How many?", None, Reason.NO_ANSWER),
        ("How many?", "  ", Reason.NO_ANSWER),
        ("How many?", "1" * 501, Reason.LONG_ANSWER),
        ("Is it so?", "No, because every prime divides some number like that", Reason.SENTENCE),
        ("Is it so?", "thereareinfinitelymanysuchprimenumbersbecause", Reason.SENTENCE),
        ("Solve.", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", None),
        ("Solve.", r"\text{no solution}", None),
        ("Which is it? (A) 1 (B) 2", "B", None),
        ("Which is it?\nA. 1\nB. 2", r"\textbf{(B)}", None),
        ("What is it?", r"\text{(C)}", Reason.CHOICES),
        ("Which point is nearest to A, B?", "B", None),
        ("What is the 5th letter of ABABA?", "A", None),
        ("x" * (MAX_TEXT + 1), "3", Reason.LONG_TEXT),
    ],
)
def test_problems_that_cannot_be_graded_are_set_aside_with_a_reason(
    problem: str, answer: str | None, reason: Reason | None
) -> None:
    assert screen(problem, answer) == reason
