"""The example for two hosts, between two network namespaces of this machine."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama2_lite.runtime.cli import main

ROOT = Path(__file__).resolve().parents[1]
path = ROOT / "benchmarks" / "kills.py"
spec = importlib.util.spec_from_file_location("kills", path)
assert spec is not None
assert spec.loader is not None
kills = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kills)

ADDRESSES = {"first": "10.77.0.1", "second": "10.77.0.2"}
MARK = f"l2-{os.getpid()}"


def ip(arguments: str) -> bool:
    """Run `ip`; whether it did what it was asked to."""
    try:
        return (
            subprocess.run(["ip", *arguments.split()], capture_output=True).returncode
            == 0
        )
    except FileNotFoundError:
        return False


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces, joined by a cable."""
    names = {host: f"{MARK}-{host}" for host in ADDRESSES}
    try:
        for name in names.values():
            if not ip(f"netns add {name}"):
                pytest.skip("network namespaces need `ip` and the rights of root")
            ip(f"-n {name} link set lo up")
        first, second = names.values()
        cable = f"link add cable netns {first} type veth peer name cable netns {second}"
        if not ip(cable):
            pytest.skip("this system has no virtual network cables")
        for host, name in names.items():
            assert ip(f"-n {name} addr add {ADDRESSES[host]}/24 dev cable")
            assert ip(f"-n {name} link set cable up")
        yield names
    finally:
        for name in names.values():
            ip(f"netns del {name}")


def test_a_run_over_two_hosts_survives_a_kill(
    hosts: dict[str, str], tmp_path: Path
) -> None:
    kills.make_world(tmp_path)
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert main(kills.arguments(tmp_path, "pretrain", alone)) == 0
    environment = {**os.environ, "PYTHON": sys.executable, "INTERFACE": "cable"}
    agents = {}
    for host, name in hosts.items():
        command = [
            *("ip", "netns", "exec", name, str(ROOT / "examples" / "two_hosts.sh")),
            *(host, ADDRESSES["first"], *kills.arguments(tmp_path, "pretrain", run)),
        ]
        with (tmp_path / f"{host}.log").open("wb") as log:
            agents[host] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment
            )
    try:
        while not kills.newest(run):
            assert agents["first"].poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.01)
        (worker,) = kills.children(agents["second"].pid)
        os.kill(worker, signal.SIGKILL)
        for host, agent in agents.items():
            code = agent.wait(timeout=200)
            assert code == 0, (tmp_path / f"{host}.log").read_text()
    finally:
        for agent in agents.values():
            agent.terminate()
    assert "continuing from step" in (tmp_path / "first.log").read_text()
    expected, found = (
        json.loads((folder / "result.json").read_text())["validation_loss"]
        for folder in (alone, run)
    )
    assert found == pytest.approx(expected, abs=1e-2)
