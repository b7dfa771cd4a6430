"""Scheduler without HTTP: answers do not depend on company, rows come free, the queue is fair and bounded."""

import threading

import numpy as np
import pytest

from rorqual.engine import Allowed, CacheFull, SamplingParams
from rorqual.serve import BadRequest, ContextTooLong, EngineFailed, Overloaded, ServeConfig, ShuttingDown
from rorqual.serve.answer import RawAnswer
from rorqual.serve.cache_report import cache_report
from rorqual.serve.metrics import Metrics
from rorqual.serve.scheduler import Job, Scheduler

from .conftest import CONTEXT
from .scripted import ScriptedRows


class Ear:
    def __init__(self, on_token=None):
        self.events, self.error, self.done, self.on_token = [], None, threading.Event(), on_token

    def on_events(self, events):
        self.events += events
        if self.on_token is not None:
            self.on_token()
        if events[-1].kind == "end":
            self.done.set()

    def on_error(self, error):
        self.error = error
        self.done.set()


@pytest.fixture
def scheduler(engine):
    made = []
    engine.prefixes.clear()

    def make(start=True, make_rows=None, **options):
        rows = {} if make_rows is None else {"make_rows": make_rows}
        one = Scheduler(engine, ServeConfig(**options), Metrics("m"), **rows)
        made.append(one)
        if start:
            one.start()
        return one

    yield make
    for one in made:
        one.close()


@pytest.fixture
def job(tokenizer):
    def make(prompt, *, tenant="", max_tokens=8, temperature=0.0, ear=None, **fields):
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=7, stop_ids=(1,))
        return Job(
            tenant=tenant,
            prompt=list(prompt),
            params=params,
            answer=RawAnswer(tokenizer),
            listener=ear or Ear(),
            keep_at=(len(prompt) - 1,),
            **fields,
        )

    return make


def wait(job):
    assert job.listener.done.wait(60)
    return job


def test_an_answer_does_not_depend_on_its_company(scheduler, job, engine):
    prompts = [[0, *range(20, 20 + length)] for length in (1, 5, 70, 130, 40)]
    jobs = [job(prompt, temperature=1.0, max_tokens=12) for prompt in prompts]
    together = scheduler()
    for one in jobs:
        together.submit(one)
    for one in jobs:
        assert wait(one).listener.error is None
    for one, prompt in zip(jobs, prompts, strict=True):
        assert one.answer.ids == [event.token_id for event in engine.open(prompt).generate(one.params)]
    assert together.held == 0 and together._reserved == 0


def test_the_next_turn_goes_on_from_the_last_one_and_says_the_same(scheduler, job, engine):
    one = scheduler()
    first = job([0, *range(20, 100)])
    one.submit(first)
    wait(first)
    longer = [*first.prompt, *first.answer.ids, 30, 31, 32]
    second, third = job(longer), job(longer)
    one.submit(second)
    wait(second)
    assert second.cached_tokens == len(first.prompt) + len(first.answer.ids) - 1
    one.submit(third)
    wait(third)
    assert third.cached_tokens == len(longer) - 1
    alone = [event.token_id for event in engine.open(longer).generate(second.params)]
    assert second.answer.ids == third.answer.ids == alone


def test_holders_of_keys_do_not_share_prefixes(scheduler, job):
    one = scheduler()
    for tenant, cached in (("a", 0), ("b", 0), ("a", 80)):
        again = job([0, *range(20, 100)], tenant=tenant)
        one.submit(again)
        assert wait(again).cached_tokens == cached


def test_a_cancelled_row_is_free_before_the_next_step_and_its_state_is_kept(scheduler, job):
    rows = []

    class Counting(ScriptedRows):
        def step(self):
            rows.append(len(self))
            return super().step()

    def leave():
        if len(gone.answer.ids) == 5:
            one.cancel(gone)
            one.cancel(gone)

    one = scheduler(make_rows=lambda engine: Counting(engine, lambda prompt: [40] * 4000))
    gone = job([0, *range(20, 60)], max_tokens=3000, ear=Ear(on_token=leave))
    one.submit(gone)
    probe = job([0, *range(20, 30)], max_tokens=20)
    one.submit(probe)
    wait(probe)
    assert len(gone.answer.ids) == 5 and not gone.listener.done.is_set()
    assert rows[-1] == 1 and one.held == 0 and one._reserved == 0
    retry = job([*gone.prompt, *gone.answer.ids], max_tokens=1)
    one.submit(retry)
    assert wait(retry).cached_tokens == len(retry.prompt) - 1


def test_a_request_cancelled_in_the_queue_or_in_prefill_never_runs(scheduler, job):
    one = scheduler(start=False)
    queued = job([0, 20, 21])
    one.submit(queued)
    one.cancel(queued)
    one.start()
    probe = job([0, 20, 22])
    one.submit(probe)
    wait(probe)
    assert queued.answer.ids == [] and not queued.listener.done.is_set() and one.held == 0


def test_holders_of_keys_take_turns(scheduler, job):
    order = []
    one = scheduler(start=False, max_running=1)
    jobs = []
    for tenant in ("a", "a", "a", "b", "c"):
        jobs.append(
            job([0, 20, 21], tenant=tenant, max_tokens=1, ear=Ear(on_token=lambda t=tenant: order.append(t)))
        )
        one.submit(jobs[-1])
    one.start()
    for each in jobs:
        wait(each)
    assert order == ["a", "b", "c", "a", "a"]


def test_the_queue_is_bounded(scheduler, job):
    one = scheduler(start=False, max_waiting=2)
    one.submit(job([0, 20]))
    one.submit(job([0, 20]))
    with pytest.raises(Overloaded) as caught:
        one.submit(job([0, 20]))
    assert 1 <= int(caught.value.headers["retry-after"]) <= 60


def test_memory_is_reserved_for_the_longest_answer(scheduler, job):
    probe = scheduler(start=False)
    need = job([0, *range(20, 40)], max_tokens=200)
    probe.submit(need)
    running = []
    one = scheduler(kv_bytes=int(1.5 * need.need_bytes))
    jobs = [
        job(need.prompt, max_tokens=200, ear=Ear(on_token=lambda: running.append(len(one._running))))
        for _ in range(3)
    ]
    for each in jobs:
        one.submit(each)
    for each in jobs:
        assert wait(each).listener.error is None
    assert set(running) <= {0, 1}
    with pytest.raises(ContextTooLong, match="bytes of cache"):
        one.check_fit(need.prompt, 2000, param="messages")


def test_what_does_not_fit_is_said_with_numbers(scheduler):
    one = scheduler()
    assert one.check_fit([0] * 10, None, param="messages") == CONTEXT - 10
    with pytest.raises(ContextTooLong) as caught:
        one.check_fit([0] * (CONTEXT - 5), 6, param="messages")
    assert (caught.value.prompt_tokens, caught.value.max_tokens, caught.value.limit) == (
        CONTEXT - 5,
        6,
        CONTEXT,
    )
    with pytest.raises(ContextTooLong, match=f"{CONTEXT} tokens"):
        one.check_fit([0] * CONTEXT, None, param="messages")
    with pytest.raises(BadRequest, match="vocabulary"):
        one.check_fit([0, 10**6], 1, param="prompt")


def test_a_failing_engine_fails_its_requests_and_no_others(scheduler, job, caplog):
    class Failing(ScriptedRows):
        def step(self):
            if any(prompt[-1] == 66 for prompt in self.prompts):
                raise RuntimeError("no memory")
            return super().step()

    one = scheduler(make_rows=lambda engine: Failing(engine, lambda prompt: None))
    bad = job([0, 20, 66])
    one.submit(bad)
    error = wait(bad).listener.error
    assert isinstance(error, EngineFailed) and "no memory" in str(error)
    good = job([0, 20, 21])
    one.submit(good)
    assert wait(good).listener.error is None and one.alive and one._reserved == 0


def test_going_down_is_said(scheduler, job):
    one = scheduler(make_rows=lambda engine: ScriptedRows(engine, lambda prompt: [40] * 4000))
    seen = threading.Event()
    running = job([0, 20, 21], max_tokens=3000, ear=Ear(on_token=seen.set))
    one.submit(running)
    assert seen.wait(60)
    one.drain()
    with pytest.raises(ShuttingDown):
        one.submit(job([0, 20]))
    one.abort_all(ShuttingDown("stopped"))
    assert str(wait(running).listener.error) == "stopped"
    one.close()
    one.close()
    assert not one.alive


def test_a_guide_decides_what_may_be_drawn_and_its_failure_is_its_own(scheduler, job, engine, caplog):
    words = -(-engine.config.vocab_size // 32)

    def only(token):
        def guide(_):
            bits = np.zeros(words, dtype=np.uint32)
            bits[token // 32] |= np.uint32(1 << token % 32)
            return Allowed(bits=bits)

        return guide

    def broken(token):
        if token is not None:
            raise KeyError("no such rule")
        return None

    one = scheduler()
    prompt = [0, *range(20, 60)]
    free, forced, failed = job(prompt), job(prompt, guide=only(45)), job(prompt, guide=broken)
    nothing = job(prompt, guide=lambda token: Allowed(bits=np.zeros(words, dtype=np.uint32)))
    for each in (free, forced, failed, nothing):
        one.submit(each)
    assert wait(forced).answer.ids == [45] * 8
    assert "no such rule" in str(wait(failed).listener.error)
    assert "allows no token" in str(wait(nothing).listener.error)
    assert wait(free).listener.error is None and one.held == 0 and one._reserved == 0


def test_what_others_ask_of_the_engine_is_done_between_steps(scheduler, job):
    one = scheduler()
    names = one.call(lambda: threading.current_thread().name).result(60)
    assert names == "rorqual-engine"
    with pytest.raises(ZeroDivisionError):
        one.call(lambda: 1 // 0).result(60)
    assert wait_for(one, job([0, *range(20, 40)])).listener.error is None
    one.close()
    with pytest.raises(ShuttingDown):
        one.call(lambda: None)


def wait_for(scheduler, job):
    scheduler.submit(job)
    return wait(job)


def test_one_that_does_not_fit_fails_alone(scheduler, job, engine):
    class Tight(ScriptedRows):
        def step(self):
            if 0 in self._rows and self._rows[0].length:
                raise CacheFull("sequence 0: no room", need=1, limit=1, key=0)
            return super().step()

    one = scheduler(make_rows=lambda engine: Tight(engine, lambda prompt: None))
    first, second = job([0, *range(20, 60)]), job([0, *range(30, 60)])
    one.submit(first)
    one.submit(second)
    error = wait(first).listener.error
    assert "no room" in str(error) and (error.status, error.code, error.retry_after) == (
        429,
        "cache_full",
        30,
    )
    assert wait(second).listener.error is None


def test_a_report_says_what_was_found_and_where_the_prompt_leaves_it(scheduler, job, tokenizer):
    one = scheduler()
    user = tokenizer.token_id("<｜User｜>")
    prompt = [0, *range(20, 90), user, *range(100, 200)]
    first = wait_for(one, job(prompt))
    report = cache_report(first.found, prompt, tokenizer)
    assert (report["tier"], report["reason"], report["cached_tokens"]) == ("none", "empty", 0)
    again = wait_for(one, job([*prompt, 250, 251]))
    assert cache_report(again.found, again.prompt, tokenizer)["reason"] in ("hit", "diverged")
    edited = [*prompt[:150], 99, *prompt[151:]]
    third = wait_for(one, job(edited))
    report = cache_report(third.found, edited, tokenizer)
    assert (report["tier"], report["reason"], report["cached_tokens"]) == ("ram", "diverged", 128)
    where = report["first_divergence"]
    assert (where["token"], where["role"]) == (150, "user")
    assert where["char"] == len(tokenizer.decode(edited[:150])) and len(where["excerpt_hash"]) == 16
    system = wait_for(one, job([*prompt[:10], 99, *prompt[11:]]))
    assert cache_report(system.found, system.prompt, tokenizer)["first_divergence"]["role"] == "system"
    one.engine.prefixes.evict(1 << 40)
    gone = wait_for(one, job(prompt))
    assert cache_report(gone.found, prompt, tokenizer)["reason"] == "evicted"
