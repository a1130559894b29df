"""Fixtures, and the rule that nothing is skipped: a missing peer or a skipped test fails the run."""

import faulthandler
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
faulthandler.enable()

from support import Client, Gateway, Mosquitto, Recorder  # noqa: E402

PEERS = {
    "mosquitto": "mosquitto",
    "mosquitto_pub": "mosquitto-clients",
    "mosquitto_sub": "mosquitto-clients",
    "strace": "strace",
}
_skipped = []


def pytest_sessionstart(session):
    missing = [
        f"{binary} (Debian package {package})"
        for binary, package in PEERS.items()
        if not (shutil.which(binary) or Path("/usr/sbin", binary).exists())
    ]
    if missing:
        pytest.exit(f"needed and not there: {', '.join(missing)}; tests/all installs them", returncode=3)


def pytest_runtest_logreport(report):
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    if _skipped and exitstatus == 0:
        print(f"\nskipped, which counts as failed here: {', '.join(_skipped)}")
        session.exitstatus = 1


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    setattr(item, f"report_{call.when}", outcome.get_result())


@pytest.fixture
def _started(request):
    """Everything the test started, ended after it in reverse order; the gateways' logs go into a failure's report."""
    started = []
    yield started
    report = getattr(request.node, "report_call", None)
    for thing in reversed(started):
        thing.end()
    if report is not None and report.failed:
        for thing in started:
            if isinstance(thing, Gateway):
                print(f"--- what the gateway in {thing.folder} said last ---\n{thing.log[-3000:]}")


@pytest.fixture
def gateway(tmp_path, _started):
    """gateway(config, …) makes and starts one; start=False only makes it."""

    def make(config="", folder="gateway", start=True, **options):
        made = Gateway(tmp_path / folder, config, **options)
        _started.append(made)
        return made.start() if start else made

    return make


@pytest.fixture
def upstream(tmp_path, _started):
    """Debian's mosquitto, running."""
    made = Mosquitto(tmp_path / "upstream")
    _started.append(made)
    return made.start()


@pytest.fixture
def client(_started):
    """client(port, id, …): a connected paho client."""

    def make(port, client_id="", connect=True, **options):
        made = Client(port, client_id, **options)
        _started.append(made)
        return made.connect() if connect else made

    return make


@pytest.fixture
def recorder(_started):
    def make(port, topic_filter="#", **options):
        made = Recorder(port, topic_filter, **options)
        _started.append(made)
        return made.start()

    return make


@pytest.fixture
def standin(_started):
    """standin(…): the scripted upstream, running."""
    from standin import StandIn

    class Ended(StandIn):
        def end(self):
            self.stop()

    def make(**options):
        made = Ended(**options).start()
        _started.append(made)
        return made

    return make


@pytest.fixture
def publishers(_started):
    """Starts publishers (see support) and ends them with the test."""

    def start(made):
        for one in made:
            _started.append(one)
            one.start()
        return made

    return start
