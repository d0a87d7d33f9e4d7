"""pytest -p shard: --sample 1/3 takes every third test; --shard 1/2 then shares those among two processes."""

import signal


def pytest_configure():
    """Give the programs under test what a terminal gives: background jobs and nohup ignore some signals."""
    for name in ("SIGHUP", "SIGINT", "SIGQUIT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # ours alone: a new program begins with the default


def pytest_addoption(parser):
    """The options that say which part of the tests is ours."""
    for name, about in (
        ("--sample", "every OF-th test, from the N-th on, and those marked in_every_sample"),
        ("--shard", "the N-th of OF shares of what is to be run"),
    ):
        parser.addoption(name, default="1/1", metavar="N/OF", help=about)


def pytest_collection_modifyitems(config, items):
    """Leave out what is not ours. The README's tests build on one another and stay together."""
    number, of = map(int, config.getoption("--sample").split("/"))
    sample = [
        item
        for index, item in enumerate(items)
        if index % of == number - 1 or item.get_closest_marker("in_every_sample")
    ]
    number, of = map(int, config.getoption("--shard").split("/"))
    shares = [
        0 if item.nodeid.startswith("tests/test_readme.py") else index % of
        for index, item in enumerate(sample)
    ]
    mine = [item for item, share in zip(sample, shares) if share == number - 1]
    if len(mine) < len(items):
        kept = set(mine)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = mine
