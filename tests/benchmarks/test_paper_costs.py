"""The paper's cost table, counted."""

import pytest

from benchmarks.costs import paper_costs


def test_the_papers_table_is_the_papers_to_its_digits():
    rows = {
        row["name"]: (round(row["macs"] / 1e9, 2), round(row["parameters"] / 1e6, 3)) for row in paper_costs.count()
    }
    assert rows["ResNet-101"] == (182.75, 42.5)
    assert rows["ResNet-101, published stem"][1] == pytest.approx(42.6, abs=0.05)
    assert rows["EMANet (512)"] == (43.06, 9.964)
    assert rows["EMANet (256)"] == (20.97, 4.851)
    assert rows["DeepLabV3, ASPP alone"] == (63.41, 15.535)  # published: 63.4 and 15.5
