"""The arithmetic of token buckets, by a clock of the test's own."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import example, given, settings
from hypothesis import strategies as st

from avmm.native import CData, ffi, lib

SECOND_NS = 10**9
BUCKET_MAX = 1 << 60
OWED_MAX = 1 << 61


class Oracle:
    """A bucket of exact fractions, for as long as nobody owes more than OWED_MAX."""

    def __init__(self, rate: int, burst: int, now_ns: int) -> None:
        self.rate, self.burst, self.at_ns = rate, burst, now_ns
        self.level = Fraction(burst)

    def refill(self, now_ns: int) -> None:
        if now_ns > self.at_ns:
            gained = Fraction(self.rate * (now_ns - self.at_ns), SECOND_NS)
            self.level = min(Fraction(self.burst), self.level + gained)
            self.at_ns = now_ns

    def take(self, tokens: int) -> None:
        self.level = max(self.level - tokens, Fraction(-OWED_MAX))

    def set(self, rate: int, burst: int, now_ns: int) -> None:
        self.refill(now_ns)
        self.rate, self.burst = rate, burst
        self.level = min(self.level, Fraction(burst))


def new(rate: int, burst: int, now_ns: int = 0) -> CData:
    bucket = ffi.new("struct av_bucket *")
    lib.av_bucket_set(bucket, rate, burst, now_ns)
    return bucket


def level(bucket: CData) -> Fraction:
    return bucket.level + Fraction(bucket.fraction, SECOND_NS)


def any_size(most: int) -> st.SearchStrategy[int]:
    """Of every order of magnitude."""
    return st.integers(0, most.bit_length() - 1).flatmap(
        lambda bits: st.integers(1 << bits, min(most, (2 << bits) - 1))
    )


RATES = any_size(BUCKET_MAX)
TIMES = st.just(0) | any_size(1 << 62)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), TIMES, st.just(0)),
        st.tuples(st.just("take"), st.just(0) | any_size((1 << 64) - 1), st.just(0)),
        st.tuples(st.just("set"), RATES, RATES),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(RATES, RATES, st.integers(0, 1 << 62), STEPS)
def test_a_bucket_is_exact_whatever_the_sizes(
    rate: int, burst: int, now_ns: int, steps: list[tuple[str, int, int]]
) -> None:
    bucket, oracle = new(rate, burst, now_ns), Oracle(rate, burst, now_ns)
    for what, first, second in steps:
        if what == "wait":
            now_ns = min(now_ns + first, (1 << 64) - 1)
            lib.av_bucket_refill(bucket, now_ns)
            oracle.refill(now_ns)
        elif what == "take":
            floor = bucket.level - first < -OWED_MAX
            lib.av_bucket_take(bucket, first)
            oracle.take(first)
            if floor:
                oracle.level = level(bucket)
        else:
            lib.av_bucket_set(bucket, first, second, now_ns)
            oracle.set(first, second, now_ns)
        assert level(bucket) == oracle.level
        assert -OWED_MAX <= bucket.level <= bucket.burst
        assert 0 <= bucket.fraction < SECOND_NS


@settings(deadline=None)
@given(RATES, RATES, st.lists(TIMES | any_size(1 << 60), max_size=3), RATES)
def test_the_wait_is_the_shortest_after_which_the_tokens_are_there(
    rate: int, burst: int, takings: list[int], wanted: int
) -> None:
    bucket = new(rate, burst)
    for index, tokens in enumerate(takings):
        lib.av_bucket_refill(bucket, index * 12_345_678_901)
        lib.av_bucket_take(bucket, tokens)
    wanted = min(wanted, burst)
    wait_ns = lib.av_bucket_wait_ns(bucket, wanted)
    lacking = wanted - level(bucket)
    exact_ns = max(0, -(-lacking * SECOND_NS // rate))
    if exact_ns >= (1 << 30) * SECOND_NS:
        assert wait_ns == (1 << 30) * SECOND_NS
    elif lacking % rate <= ((1 << 64) - 1) // SECOND_NS:
        assert wait_ns == exact_ns
    else:
        assert abs(wait_ns - exact_ns) <= 1


@example(1_066_246_973_296, 8202, [(92, 8_973_007_470), (81, 80_873_096_014), (3, 16)])
@settings(deadline=None)
@given(
    any_size(1 << 40),
    any_size(1 << 40),
    st.lists(st.tuples(st.integers(0, 1 << 36), any_size(1 << 41)), min_size=1, max_size=40),
)
def test_in_any_window_there_pass_burst_and_rate_and_one_request(
    rate: int, burst: int, requests: list[tuple[int, int]]
) -> None:
    """Requests come `gap` ns after the one before; each is begun as soon as a token is there."""
    bucket = new(rate, burst)
    begun: list[tuple[int, int]] = []
    now_ns = 0
    for gap_ns, size in requests:
        now_ns += gap_ns
        lib.av_bucket_refill(bucket, now_ns)
        # Of numbers as large as some of these it is said in round figures: wait again.
        while wait_ns := lib.av_bucket_wait_ns(bucket, 1):
            now_ns += wait_ns
            lib.av_bucket_refill(bucket, now_ns)
        assert bucket.level > 0
        size = min(size, 1000 * rate)  # so that the clock does not run out
        lib.av_bucket_take(bucket, size)
        begun.append((now_ns, size))
    for first, (began_ns, _) in enumerate(begun):
        total = 0
        for at_ns, size in begun[first:]:
            assert total <= burst + Fraction(rate * (at_ns - began_ns), SECOND_NS)
            total += size


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = new(1000, 10, now_ns=5 * SECOND_NS)
    lib.av_bucket_take(bucket, 10)
    for now_ns in (5 * SECOND_NS, 4 * SECOND_NS, 0):
        lib.av_bucket_refill(bucket, now_ns)
        assert bucket.level == 0
    lib.av_bucket_refill(bucket, 5 * SECOND_NS + 1_000_000)
    assert bucket.level == 1


def test_new_limits_take_effect_from_the_present_level() -> None:
    bucket = new(1000, 100)
    lib.av_bucket_take(bucket, 400)
    lib.av_bucket_set(bucket, 10, 20, 100_000_000)
    assert bucket.level == -200, "a tenth of a second by the old rate"
    assert lib.av_bucket_wait_ns(bucket, 1) == 201 * SECOND_NS // 10
    lib.av_bucket_set(bucket, 0, 0, 0)
    lib.av_bucket_set(bucket, 10, 20, 0)
    assert bucket.level == 20, "full again after no limit at all"
