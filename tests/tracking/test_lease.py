"""Leases on a clock that the test sets: who may build a key, and when a silent host loses it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from mmphi.tracking.lease import HEARTBEAT, HELD, Lease, lease_s
from mmphi.tracking.run_writer import TrackingStore


class Hosts:
    """Two hosts that want the same key; a host's sleep moves the one clock, and runs what the other does meanwhile."""

    def __init__(self, uri: str) -> None:
        self.client: MlflowClient = TrackingStore(uri).client
        self.now = 1000.0
        self.slept: list[float] = []
        self.meanwhile = lambda: None
        self.leases = {name: self._lease(name) for name in ("one", "two")}
        self.reports: list[str] = []

    def _lease(self, host: str) -> Lease:
        tags = {"mmphi.host": host, "mmphi.pid": "7", "mmphi.lock_domain": host}
        run_id = self.client.create_run("0", tags=tags).info.run_id
        return Lease(self.client, run_id, host, clock=lambda: self.now, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        assert len(self.slept) < 1000, "it waits for ever"
        self.meanwhile()

    def claim(self, host: str) -> bool:
        lease = self.leases[host]

        def others() -> Iterator[Run]:
            return (run for run in self.client.search_runs(["0"]) if run.info.run_id != lease.run_id)

        return lease.claim(others, self.reports.append)


@pytest.fixture
def hosts(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    monkeypatch.setenv("MMPHI_LEASE_S", "90")
    return Hosts(empty_store)


def test_a_free_key_is_held_without_a_wait(hosts: Hosts) -> None:
    assert hosts.claim("one") is False
    assert hosts.slept == hosts.reports == []
    assert hosts.client.get_run(hosts.leases["one"].run_id).data.tags[HELD] == "held"


def test_a_silent_holder_is_taken_over_after_the_lease(hosts: Hosts) -> None:
    hosts.claim("one")
    hosts.now += 80
    assert hosts.claim("two") is True
    assert hosts.reports == ["process 7 on one"]
    assert 1000 + lease_s() <= hosts.now < 1000 + lease_s() + 5  # It looks every 5 s at most.


def test_a_heartbeat_keeps_the_key_for_any_time(hosts: Hosts) -> None:
    hosts.claim("one")

    def beat() -> None:
        if hosts.now < 1000 + 3 * lease_s():
            hosts.leases["one"].beat()

    hosts.meanwhile = beat
    assert hosts.claim("two") is True
    assert 1000 + 4 * lease_s() - 10 < hosts.now < 1000 + 4 * lease_s() + 5


def test_a_finished_holder_is_not_waited_for_any_longer(hosts: Hosts) -> None:
    hosts.claim("one")
    hosts.meanwhile = lambda: hosts.client.set_terminated(hosts.leases["one"].run_id, "FINISHED")
    assert hosts.claim("two") is True
    assert len(hosts.slept) == 1


def test_of_two_that_claim_at_once_the_one_that_sees_the_other_steps_back(hosts: Hosts) -> None:
    """The other's claim is written between this one's look and its own claim."""
    one, two = hosts.leases["one"], hosts.leases["two"]
    looks: list[str] = []

    def others() -> Iterator[Run]:
        looks.append(hosts.client.get_run(two.run_id).data.tags.get(HELD, ""))
        if len(looks) == 1:
            return iter(())
        if len(looks) == 2:
            one.beat()
            hosts.client.set_tag(one.run_id, HELD, "held")
        return iter([hosts.client.get_run(one.run_id)])

    def finish() -> None:
        looks.append(hosts.client.get_run(two.run_id).data.tags[HELD])
        hosts.client.set_terminated(one.run_id, "FINISHED")

    hosts.meanwhile = finish
    assert two.claim(others, hosts.reports.append) is True
    assert looks[:3] == ["", "held", "waiting"]
    assert hosts.client.get_run(two.run_id).data.tags[HELD] == "held"


def test_a_lease_beats_while_it_is_held(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPHI_LEASE_S", "0.2")
    client = TrackingStore(empty_store).client
    run_id = client.create_run("0").info.run_id
    with Lease(client, run_id, "one"):
        beats: set[str] = set()
        while len(beats) < 3:
            beats.add(client.get_run(run_id).data.tags.get(HEARTBEAT, ""))


def test_a_run_under_the_same_lock_folder_must_be_dead(hosts: Hosts) -> None:
    """This process could not hold the lock of the key otherwise."""
    hosts.claim("one")
    hosts.leases["two"].domain = "one"
    assert hosts.claim("two") is False
