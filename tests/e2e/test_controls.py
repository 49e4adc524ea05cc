"""Every control over real processes, with a tiny model: it shows, it composes, and nothing that happens changes it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pagewire import Answer, Choice, Client, FinishReason
from protos import inference_pb2 as pb
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster
from tests.e2e.programs import PAGEWIRE, run
from tests.e2e.survivors import answers_through_a_kill

PROMPT = [70, 71, 72, 5, 9]
LETTERS = list(range(64, 72))  # a to h in the tokenizer of the fake model
NUM_NEW = 40

MIXED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "typical": {"temperature": 1.5, "typical_p": 0.4},
    "cut": {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "repetition": {"repetition_penalty": 1.4},
    "presence": {"temperature": 1.0, "presence_penalty": 1.5, "allowed_token_ids": LETTERS},
    "frequency": {"frequency_penalty": 0.5, "logit_bias": {7: 3.0, 8: 3.0}},
    "words": {"allowed_token_ids": LETTERS, "bad_words": ["ab", "c", "ha"]},
    "banned": {"temperature": 1.0, "banned_token_ids": list(range(100))},
    "ends": {"temperature": 1.0, "ignore_eos": False, "logit_bias": {fake_model.EOS: 6.0}, "min_tokens": 7},
    "everything": {
        "temperature": 1.2,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.001,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {64: 2.0, 200: -3.0},
        "banned_token_ids": [1, 2, 3],
        "bad_words": ["a", "the end"],
        "min_tokens": 10,
    },
}


DEFAULTS: dict[str, Any] = {
    "token_ids": PROMPT,
    "temperature": 0.0,
    "max_tokens": NUM_NEW,
    "ignore_eos": True,
    "seed": 11,
}


def ask(running: Cluster, **settings: Any) -> Answer:
    with Client(running.address) as client:
        return client.generate(**{**DEFAULTS, **settings})


def tokens(running: Cluster, **settings: Any) -> tuple[int, ...]:
    return ask(running, **settings).token_ids


def test_a_banned_token_is_never_chosen(server: Cluster) -> None:
    first = tokens(server)[0]

    assert first not in tokens(server, banned_token_ids=[first])


def test_nothing_but_an_allowed_token_is_chosen(server: Cluster) -> None:
    assert set(tokens(server, allowed_token_ids=LETTERS, temperature=2.0)) <= set(LETTERS)


def test_a_bias_moves_the_choice(server: Cluster) -> None:
    assert set(tokens(server, logit_bias={7: 100.0})) == {7}
    assert 7 not in tokens(server, logit_bias={7: -100.0}, allowed_token_ids=[7, 8])


def test_a_repetition_penalty_lets_nothing_of_prompt_or_answer_come_again(server: Cluster) -> None:
    answer = tokens(server, repetition_penalty=100.0)

    assert len({*PROMPT, *answer}) == len(PROMPT) + len(answer)
    assert len(set(tokens(server))) < NUM_NEW


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_what_the_answer_has_is_penalised(server: Cluster, name: str) -> None:
    plain = tokens(server, allowed_token_ids=LETTERS)
    penalised = tokens(server, allowed_token_ids=LETTERS, **{name: 2.0})
    favoured = tokens(server, allowed_token_ids=LETTERS, **{name: -2.0})

    assert penalised != plain
    assert len(set(favoured)) < len(set(penalised))


def test_a_bad_word_is_never_completed(server: Cluster) -> None:
    said = ask(server, allowed_token_ids=LETTERS).text
    word = said[:2]

    assert word not in ask(server, allowed_token_ids=LETTERS, bad_words=[word]).text


def test_nothing_ends_an_answer_before_min_tokens(server: Cluster) -> None:
    eager: dict[str, Any] = {"ignore_eos": False, "logit_bias": {fake_model.EOS: 100.0}}

    at_once, later = ask(server, **eager), ask(server, **eager, min_tokens=5)

    assert (at_once.finish.reason, at_once.usage.completion_tokens) == (FinishReason.EOS, 1)
    assert (later.finish.reason, later.usage.completion_tokens) == (FinishReason.EOS, 6)
    assert len(tokens(server, logit_bias={7: 100.0}, stop_token_ids=[7], min_tokens=4)) == 5


def test_a_stop_string_ends_the_text_before_or_behind_it_but_not_before_min_tokens(server: Cluster) -> None:
    said = ask(server, allowed_token_ids=LETTERS).text
    stop = said[3:5]
    end = said.index(stop)

    assert ask(server, allowed_token_ids=LETTERS, stop=stop).text == said[:end]
    assert ask(server, allowed_token_ids=LETTERS, stop=stop, include_stop=True).text == said[: end + 2]
    later = ask(server, allowed_token_ids=LETTERS, stop=stop, min_tokens=end + 3).text
    assert len(later) > end + 2 and said.startswith(later)


def test_typical_sampling_takes_the_token_of_expected_surprise(server: Cluster) -> None:
    typical = {tokens(server, temperature=1.0, typical_p=1e-6, seed=seed) for seed in range(4)}
    plain = {tokens(server, temperature=1.0, seed=seed) for seed in range(4)}

    assert (len(typical), len(plain)) == (1, 4)
    assert typical != {tokens(server)}


def test_the_best_of_several_are_the_likeliest_that_n_makes(server: Cluster) -> None:
    def mean(choice: Choice) -> float:
        return sum(each.token.logprob or 0.0 for each in choice.logprobs) / len(choice.logprobs)

    sampled: dict[str, Any] = {"temperature": 1.0, "ignore_eos": False, "logit_bias": {fake_model.EOS: 5.0}}
    made = ask(server, **sampled, n=8, logprobs=0).choices
    best = ask(server, **sampled, n=3, best_of=8).choices
    ranked = sorted(made, key=mean, reverse=True)

    assert len({len(choice.token_ids) for choice in made}) > 2
    assert [choice.token_ids for choice in best] == [choice.token_ids for choice in ranked[:3]]
    discarded = sum(len(choice.token_ids) for choice in ranked[3:])
    assert [choice.finish.usage.discarded_tokens for choice in best] == [discarded, 0, 0]
    assert not any(choice.logprobs for choice in best)


def test_salts_opt_outs_and_pins_change_what_is_computed_and_never_what_is_said(server: Cluster) -> None:
    prompt = [(3 * i) % 60 + 200 for i in range(40)]  # no other test's begins so

    def cached(**settings: Any) -> int:
        answer = ask(server, token_ids=prompt, max_tokens=4, **settings)
        said.add(answer.token_ids)
        return answer.usage.cached_prompt_tokens

    said: set[tuple[int, ...]] = set()
    assert cached(no_cache=True) == cached() == 0
    assert cached() == 39
    assert cached(no_cache=True) == 0
    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") == 39
    answer = ask(server, token_ids=prompt, pin_seconds=60, pin_tokens=32)
    assert answer.pinned is not None and answer.pinned.tokens == 32
    with Client(server.address) as client:
        assert client.unpin(answer.pinned.pin_id) == 32
        assert client.unpin() == 0
    assert len(said) == 1


def test_a_batch_of_mixed_controls_gives_each_what_it_gets_alone(server: Cluster) -> None:
    alone = {name: tokens(server, **settings) for name, settings in MIXED.items()}

    assert len(set(alone.values())) == len(MIXED), "every one of them has an effect"
    assert all_at_once(server) == alone


def test_controls_hold_when_blocks_run_out(server: Cluster, tiny: Path, tmp_path: Path) -> None:
    undisturbed = all_at_once(server)
    running = Cluster(tiny, tmp_path, flags=["--log-format=json"])
    try:
        crowded = running.crowded(len(MIXED), lambda: all_at_once(running), "--num-blocks=20", "--block-size=4")
        preemptions = running.counters()["preemptions"]
    finally:
        running.close()

    assert crowded == undisturbed
    assert preemptions > 0


def test_controls_hold_when_an_executor_is_killed(server: Cluster, tiny: Path, tmp_path: Path) -> None:
    asked = ["frequency", "words", "banned", "everything"]
    long: dict[str, Any] = {"max_tokens": 400, "logprobs": 1}
    undisturbed = [ask(server, **{**MIXED[name], **long}) for name in asked]
    answers, moved = answers_through_a_kill(tiny, tmp_path, [{**DEFAULTS, **MIXED[name], **long} for name in asked])

    assert moved > 0
    for before, after in zip(undisturbed, answers, strict=True):
        assert (before.token_ids, before.text, before.logprobs) == (after.token_ids, after.text, after.logprobs)


def all_at_once(running: Cluster) -> dict[str, tuple[int, ...]]:
    with ThreadPoolExecutor(len(MIXED)) as pool:
        answers = pool.map(lambda settings: tokens(running, **settings), MIXED.values())
        return dict(zip(MIXED, answers, strict=True))


def test_a_stream_with_every_control_goes_on_behind_any_token_as_if_it_had_never_ended(server: Cluster) -> None:
    controls = pb.SamplingParams(
        temperature=1.1,
        seed=5,
        typical_p=0.9,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        logit_bias={64: 3.0, fake_model.EOS: 4.0},
        banned_token_ids=[1, 2],
        bad_words=["ab", "c"],
    )
    asked = pb.GenerateStreamRequest(
        request_id="goes-on",
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=controls,
        stopping=pb.StopConditions(max_tokens=NUM_NEW, min_tokens=30, stop=["ac"], include_stop=True),
    )
    first, *deltas, end = server.stub.GenerateStream(asked)
    asked.stopping.max_tokens = first.prompt.max_tokens
    whole = [token for message in deltas for token in message.delta.token_ids]

    for number in range(0, len(deltas), 7):
        sent = [token for message in deltas[: number + 1] for token in message.delta.token_ids]
        point = pb.ResumePoint(choice=0, ticket=deltas[number].delta.ticket, token_ids=sent)
        _, *rest = server.stub.Resume(pb.ResumeRequest(request=asked, choices=[point]))
        later = [token for message in rest[:-1] for token in message.delta.token_ids]
        assert sent + later == whole
        assert rest[-1].finish.reason == end.finish.reason


def test_the_command_line_has_every_control(server: Cluster) -> None:
    asked = ["generate", "--address", server.address, "--raw", "--no-stats", "--temperature=0", "--max-tokens=6"]
    controls = ["--allowed-token-ids=64,65,66", "--logit-bias=64=50", "--logit-bias=65=30", "--presence-penalty=2"]

    ended = run(*PAGEWIRE, *asked, *controls, "--bad-words=aa", "--stop=ba", "--include-stop", "--min-tokens=2", "hi")

    assert (ended.code, ended.out.strip()) == (0, "aba"), ended.err
    cache = ["--cache-salt=x", "--pin-seconds=60", "--pin-tokens=1", "--best-of=2"]
    assert run(*PAGEWIRE, *asked, *controls, *cache, "hi").code == 0
    with Client(server.address) as client:
        assert client.unpin() == 1


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--logit-bias=64", "must be a token id, = and a number, got '64'"),
        ("--banned-token-ids=a", "must be token ids with commas between them, got 'a'"),
        ("--allowed-token-ids=-1", "error: --allowed-token-ids: -1 is out of range"),
        ("--logit-bias=-1=2", "error: --logit-bias: -1 is out of range"),
        ("--min-tokens=-1", "error: --min-tokens: -1 is out of range"),
    ],
)
def test_a_flag_that_cannot_be_sent_is_named(server: Cluster, flag: str, problem: str) -> None:
    ended = run(*PAGEWIRE, "generate", "--address", server.address, flag, "hi")

    assert ended.code in (1, 2)
    assert problem in ended.err
