from __future__ import annotations

import pytest

from mhacut.budget import Budget, format_flops
from mhacut.errors import UsageError


@pytest.mark.parametrize(
    ("text", "resource", "amount"),
    [
        ("2.0G", "flops", 2_000_000_000),
        ("2e9", "flops", 2_000_000_000),
        ("12.5%", "flops", 125),
        (".5K", "flops", 500),
        ("2.8M", "params", 2_800_000),
        ("6MB", "size", 6_000_000),
        ("1.5MiB", "size", 1_572_864),
        ("12B", "size", 12),
        ("6e6", "size", 6_000_000),
        ("12ms", "max_latency", 12_000_000),
        ("0.012s", "max_latency", 12_000_000),
        ("800us", "max_latency", 800_000),
        ("7ns", "max_latency", 7),
    ],
)
def test_budgets_as_people_write_them(text, resource, amount):
    assert Budget.parse(text, resource).amount(dense=1000) == amount


@pytest.mark.parametrize(
    ("text", "resource"),
    [
        ("6MB", "params"), ("6M", "size"), ("6mb", "size"), ("6i", "size"), ("12", "max_latency"),
        ("12m", "max_latency"), ("12 ms", "max_latency"), ("0ms", "max_latency"), ("-1ms", "max_latency"),
        ("12MB", "max_latency"), ("2.0G", "max_latency"),
    ],
)  # fmt: skip
def test_units_of_another_resource_are_refused(text, resource):
    with pytest.raises(UsageError, match=f"{resource}='{text}' is not a budget; write "):
        Budget.parse(text, resource)


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


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0"), (999, "999"), (999_600, "1.00M"), (17_582_740_224, "17.6G"), (1_258_411_200, "1.26G")],
)
def test_three_digits(flops, text):
    assert format_flops(flops) == text
