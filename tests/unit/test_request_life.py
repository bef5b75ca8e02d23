"""Sums over vLLM's request events."""

from types import SimpleNamespace

from verl_heddle.verl_plugin.request_life import PREEMPTED, QUEUED, SCHEDULED, RequestLife, RequestLives


def test_waiting_includes_the_time_after_a_preemption():
    life = RequestLife()
    for kind, at in ((QUEUED, 1.0), (SCHEDULED, 3.0), (PREEMPTED, 10.0), (SCHEDULED, 14.0)):
        life.event(kind, at)
    assert (life.queue_s, life.preemptions) == (6.0, 1)


def test_events_are_read_as_they_pass_and_belong_to_the_callers_id():
    seen = []
    processor = SimpleNamespace(process_outputs=lambda outputs, *rest, **more: seen.append((outputs, rest, more)) or "result")
    lives = RequestLives()
    lives.listen(processor)
    events = [SimpleNamespace(type=QUEUED, timestamp=1.0), SimpleNamespace(type=SCHEDULED, timestamp=1.5)]
    outputs = [SimpleNamespace(request_id="abc-12345678", events=events), SimpleNamespace(request_id="other-1", events=None)]
    assert processor.process_outputs(outputs, 7, iteration_stats=None) == "result"
    assert seen == [(outputs, (7,), {"iteration_stats": None})]
    assert lives.pop("abc").queue_s == 0.5
    assert lives.pop("abc") is None and lives.pop("other") is None


def test_lives_are_bounded(monkeypatch):
    monkeypatch.setattr("verl_heddle.verl_plugin.request_life.MAX_LIVES", 3)
    lives = RequestLives()
    for i in range(10):
        lives.life(str(i))
    assert [str(i) for i in range(10) if lives.pop(str(i))] == ["7", "8", "9"]
