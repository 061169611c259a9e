"""What a request refuses, how it says so, and where its defaults are read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from solving_support import dense_model, expert_model, one_card

from placement.cli import options, solve, tune, verify
from placement.errors import InputError
from placement.inputs import engine_options
from placement.inputs.problem import Settings
from placement.inputs.quants import KV_CACHE_TYPES
from placement.llamacpp.context_rules import MAX_SLOTS
from placement.solve.constraints import constraints_of
from placement.solve.questions import answered
from placement.solve.request import INT_MAX, MOST_BEST, FixedSettings, LoadMode, Request
from placement.solve.solve import make_problem

WHOLE = {  # field: (option, least, most)
    "ctx_tokens": ("--ctx", 1, INT_MAX),
    "n_slots": ("--parallel", 1, MAX_SLOTS),
    "ubatch_tokens": ("--ubatch", 1, INT_MAX),
    "prompt_tokens": ("--prompt", 1, INT_MAX),
    "generate_tokens": ("--generate", 1, INT_MAX),
    "depth_tokens": ("--depth", 0, INT_MAX),
    "n_best": ("--top", 0, MOST_BEST),
    "seed": ("--seed", 0, INT_MAX),
    "n_gpu_layers": ("--ngl", 0, INT_MAX),
    "max_cpu_layers": ("--max-cpu-layers", 0, INT_MAX),
}
NUMBERS = {"reserve_mib": "--reserve", "min_decode_tps": "--min-decode", "time_limit_s": "--time-limit"}
MODEL, MACHINE = expert_model(2), one_card(2000)


def refusal(**asked: Any) -> InputError:
    """The error of a request that must not be."""
    with pytest.raises(InputError) as caught:
        Request(**asked)
    return caught.value


def test_an_unknown_objective_names_option_value_and_rule() -> None:
    """The error is in the words of the command line."""
    error = refusal(objective="fastest")
    assert "--objective: 'fastest': must be one of turn, decode, prompt" == str(error)


@pytest.mark.parametrize("name", WHOLE)
@given(data=st.data())
def test_whole_numbers_within_their_limits_are_taken(name: str, data: st.DataObject) -> None:
    """Every whole number from the least to the most is a request."""
    _, least, most = WHOLE[name]
    value = data.draw(st.integers(least, most))
    assert value == getattr(Request(**{name: value}), name)


@pytest.mark.parametrize("name", WHOLE)
@given(data=st.data())
def test_whole_numbers_beyond_their_limits_are_refused(name: str, data: st.DataObject) -> None:
    """One less than the least, one more than the most, and all beyond, with the option and the value."""
    option, least, most = WHOLE[name]
    value = data.draw(st.one_of(st.integers(max_value=least - 1), st.integers(min_value=most + 1)))
    error = refusal(**{name: value})
    assert (option, value) == (error.where, error.value)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [True, 1.5, "7", float("nan")])
def test_what_is_no_whole_number_is_refused(name: str, value: object) -> None:
    """A truth, a fraction, a text or NaN is no number of tokens."""
    error = refusal(**{name: value})
    assert (WHOLE[name][0], "must be a whole number") == (error.where, error.rule)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "3", True])
def test_what_is_no_finite_number_is_refused(name: str, value: object) -> None:
    """NaN, infinities, texts and truths are no reserve, speed or time."""
    error = refusal(**{name: value})
    assert (NUMBERS[name], "must be a finite number") == (error.where, error.rule)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("reserve_mib", -0.5, "must be at least 0"),
        ("min_decode_tps", 0.0, "must be above 0"),
        ("min_decode_tps", -1.0, "must be above 0"),
        ("time_limit_s", 0.04, "must be at least 0.05"),
    ],
)
def test_numbers_below_their_least_are_refused(name: str, value: float, rule: str) -> None:
    """A reserve may be nothing, a speed that is asked for may not, a search needs some time."""
    assert rule == refusal(**{name: value}).rule


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ({"program": "llama-cli"}, "--program"),
        ({"load_modes": ("fast",)}, "--load-mode"),
        ({"load_modes": ()}, "--load-mode"),
        ({"load_modes": "none"}, "--load-mode"),
        ({"kv_type": "q9"}, "--kv"),
        ({"kv_type": ""}, "--kv"),
        ({"kv_type": 8}, "--kv"),
        ({"tensor_split": (1.0, math.inf)}, "--ts"),
        ({"tensor_split": (1.0, -1.0)}, "--ts"),
        ({"tensor_split": ()}, "--ts"),
        ({"devices": ()}, "--devices"),
        ({"devices": "CUDA0"}, "--devices"),
        ({"pins": "blk=CUDA0"}, "--pin"),
        ({"pins": (3,)}, "--pin"),
        ({"keep": ["-ub", "512"]}, "--keep"),
        ({"keep": "-ub many"}, "-ub"),
        ({"keep": "-ctk q9"}, "-ctk"),
    ],
)
def test_a_word_or_list_that_cannot_be_is_refused(asked: dict[str, Any], option: str) -> None:
    """Unknown words, empty lists, and a text where a list belongs name their option."""
    assert option == refusal(**asked).where


@pytest.mark.parametrize(
    ("fixed", "option"),
    [
        ({"batch_tokens": 0}, "-b"),
        ({"flash_attention": "maybe"}, "-fa"),
        ({"kv_type_k": "q9"}, "-ctk"),
        ({"kv_type_v": "q9"}, "-ctv"),
        ({"n_threads": 1.5}, "--threads"),
    ],
)
def test_a_fixed_setting_that_the_engine_refuses_is_refused(fixed: dict[str, Any], option: str) -> None:
    """Fixed settings have the engine's own rules."""
    with pytest.raises(InputError) as caught:
        FixedSettings(**fixed)
    assert option == caught.value.where


def test_no_thread_is_refused() -> None:
    """--threads 0 computes nothing."""
    assert "--threads" == refusal(fixed=FixedSettings(n_threads=0)).where


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(Request) if f.default not in (None, dataclasses.MISSING)]
)
def test_what_has_a_default_cannot_be_none(name: str) -> None:
    """None stands only where it means that something is left open."""
    assert name == refusal(**{name: None}).field


def test_a_request_stays_as_it_was_made() -> None:
    """Neither known nor new fields can be set."""
    with pytest.raises((AttributeError, TypeError)):
        Request().seed = 2  # type: ignore[misc]
    assert not hasattr(Request(), "__dict__")


def test_a_changed_request_is_checked_again() -> None:
    """`replace` has the same rules."""
    with pytest.raises(InputError, match="--reserve"):
        dataclasses.replace(Request(), reserve_mib=-1.0)


@given(st.sampled_from(KV_CACHE_TYPES), st.booleans())
def test_kv_types_are_taken_in_either_case(kv_type: str, is_upper: bool) -> None:
    """F16 is f16 by the time it is a problem."""
    request = Request(kv_type=kv_type.upper() if is_upper else kv_type)
    assert kv_type == make_problem(MODEL, MACHINE, request)[0].settings.kv_type_v


def test_an_open_kv_type_makes_no_problem() -> None:
    """auto is a question, answered before there is a problem."""
    with pytest.raises(InputError, match="--kv"):
        make_problem(MODEL, MACHINE, Request(kv_type="auto"))


def test_load_modes_are_the_engines() -> None:
    """A request knows the load modes that the engine's parser knows."""
    assert engine_options.LOAD_MODES == get_args(LoadMode)


def test_fixed_settings_are_fields_of_the_settings() -> None:
    """Each can be put into `Settings` by its name."""
    names = {each.name for each in dataclasses.fields(FixedSettings)}
    assert names <= {each.name for each in dataclasses.fields(Settings)}


def test_kept_arguments_win_over_fixed_settings() -> None:
    """What `keep` says of a setting comes last."""
    request = Request(fixed=FixedSettings(n_threads=4), keep="-t 6 -b 4096")
    settings = make_problem(MODEL, MACHINE, request)[0].settings
    assert (6, 4096) == (settings.n_threads, settings.batch_tokens)


def test_what_is_asked_wins_over_kept_arguments() -> None:
    """A context of the request comes before that of `keep`, and that before the profile's."""
    kept = Request(keep="-c 2048 -np 2")
    asked = dataclasses.replace(kept, ctx_tokens=1024)
    sizes = [make_problem(MODEL, MACHINE, each)[0].settings.ctx_tokens for each in (kept, asked)]
    assert [2048, 1024] == sizes


def test_constraints_are_told_in_the_users_words() -> None:
    """Each placement that stays is one constraint, those of `keep` last."""
    request = Request(
        devices=("CUDA0",), n_gpu_layers=3, max_cpu_layers=1, pins=(r"blk\.1\.=CUDA0",), keep="-ub 256"
    )
    expected = ["--devices CUDA0", "--ngl 3", "--max-cpu-layers 1", r"--pin 'blk\\.1\\.=CUDA0'", "-ub 256"]
    assert expected == [constraint.text for constraint in constraints_of(dense_model(3), MACHINE, request)]


@pytest.mark.parametrize(
    ("maximize", "rule"), [("prompt", "needs --min-decode T"), ("all", "must be one of")]
)
def test_what_is_maximized_needs_a_limit(maximize: Any, rule: str) -> None:
    """Without a decode speed to keep there is nothing to give away, and only three things can be had most of."""
    with pytest.raises(InputError, match=rule):
        answered(MODEL, MACHINE, Request(), maximize)


@pytest.mark.parametrize("command", [solve.command, tune.command, verify.command])
def test_options_take_their_defaults_from_the_request(command: click.Command) -> None:
    """An option left out gives the request's own default."""
    context = command.make_context("x", ["MODEL"])
    assert Request() == options.request_of(context.params)


def test_every_field_can_be_asked_for_on_the_command_line() -> None:
    """Load modes apart, which only `--keep -lm` fixes, `place solve` has an option for each field."""
    names = {each.name for each in solve.command.params}
    assert {each.name for each in dataclasses.fields(Request)} - names == {"load_modes"}


def test_layer_counts_of_nothing_are_refused() -> None:
    """`--ts 0,0` places no layer on any card: that is `--devices none`, or a mistake."""
    with pytest.raises(InputError, match="--ts"):
        Request(tensor_split=(0.0, 0.0))
