"""Options of `make bench`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of the blocks")
    group.addoption("--quick", action="store_true", help="few and small sizes: two minutes")
    group.addoption("--memory-limit", type=float, default=8.0, metavar="GB", help="skip what would allocate more")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        from benchmarks.costs.bench_blocks import cases

        chosen = cases(metafunc.config.getoption("--quick"))
        metafunc.parametrize("case", chosen, ids=str, scope="session")
