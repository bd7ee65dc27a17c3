from __future__ import annotations

import pytest

from mhacut.budget import Budget, format_flops
from mhacut.errors import UsageError


@pytest.mark.parametrize(
    ("text", "flops"),
    [
        ("2.0G", 2_000_000_000),
        ("600M", 600_000_000),
        ("2e9", 2_000_000_000),
        ("50%", 500),
        ("12.5%", 125),
        (".5K", 500),
    ],
)
def test_budgets_as_people_write_them(text, flops):
    assert Budget.parse(text).amount(dense=1000) == flops


@pytest.mark.parametrize(
    "text",
    ["2,0G", "nan", "inf", "0", "0%", "-1G", "", "2GB", "2.0 G", "G", "1e400", "150%", "50 %", "0x10", "²G"],
)
def test_anything_else_is_refused_with_the_forms_that_work(text):
    with pytest.raises(UsageError, match=r"flops="):
        Budget.parse(text)


def test_a_budget_is_the_number_that_was_written():
    for hundredths in range(1, 1000):
        text = f"{hundredths // 100}.{hundredths % 100:02}"
        assert Budget.parse(f"{text}G").amount(1) == hundredths * 10**7
        assert Budget.parse(f"{text}%").amount(10**4) == hundredths
        assert Budget.parse(format_flops(hundredths * 10**7, up=True)).amount(1) == hundredths * 10**7


def test_labels_fit_file_names():
    assert [Budget.parse(text).label for text in ("2.0G", "50%")] == ["2.0G", "50pct"]


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0"), (999, "999"), (999_600, "1.00M"), (17_582_740_224, "17.6G"), (1_258_411_200, "1.26G")],
)
def test_three_digits(flops, text):
    assert format_flops(flops) == text
