"""pytest -p shard: --sample 1/3 takes every third test; --claims FOLDER shares them with other processes.

Each process that is given the same folder takes the next test that none has taken, so that all end together.
"""

import os
import signal

import pytest


def pytest_configure():
    """Give the programs under test what a terminal gives: background jobs and nohup ignore some signals."""
    for name in ("SIGHUP", "SIGINT", "SIGQUIT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # ours alone: a new program begins with the default


def pytest_addoption(parser):
    """The options that say which part of the tests is ours."""
    parser.addoption("--sample", default="1/1", metavar="N/OF",
                     help="every OF-th test, from the N-th on, and those marked in_every_sample")
    parser.addoption("--claims", metavar="FOLDER", help="share the tests with those given this folder")


def pytest_collection_modifyitems(config, items):
    """Leave out what is not in the sample."""
    number, of = map(int, config.getoption("--sample").split("/"))
    mine = [item for index, item in enumerate(items)
            if index % of == number - 1 or item.get_closest_marker("in_every_sample")]
    if len(mine) < len(items):
        kept = set(mine)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = mine


def claim(items, folder):
    """The items that this process is the first to want."""
    os.makedirs(folder, exist_ok=True)
    for index, item in enumerate(items):
        try:
            os.close(os.open(os.path.join(folder, str(index)), os.O_CREAT | os.O_EXCL))
            yield item
        except FileExistsError:
            pass


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Run what can be claimed."""
    folder = session.config.getoption("--claims")
    if not folder or session.testsfailed or session.config.option.collectonly:
        return None
    items = claim(session.items, folder)
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True
