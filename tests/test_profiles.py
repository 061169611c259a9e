"""A models.conf reviewed: models found, defaults, problems, and what was applied found equal."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from first_user import CONF, choice

from placement.cli import cli
from placement.cli.show.profile_tables import review_lines
from placement.configs.formats.launches import launches_of_conf
from placement.configs.models_conf.apply import apply_choice
from placement.configs.models_conf.choice import choice_of
from placement.configs.models_conf.find_model import ModelFinder, read_mapping, remember
from placement.configs.models_conf.models_conf import parse_models_conf
from placement.configs.models_conf.review import Defaults, ProfileReview, profile_row, review
from placement.configs.models_conf.sections import section_of, section_request
from placement.errors import InputError
from placement.inputs.machine import Machine
from placement.inputs.machine_files import resolve_machine
from placement.solve.request import Request
from placement.solve.solve import make_problem


@pytest.fixture(scope="module")
def machine() -> Machine:
    """The reference machine."""
    return resolve_machine("rtx4090-rtx5070ti")


def _review(machine: Machine, text: str, defaults: str = "", **mapping: str) -> list[ProfileReview]:
    conf = parse_models_conf(text.encode())
    finder = ModelFinder(mapping)
    return list(review(conf, machine, finder, Defaults.of_text(defaults), is_solved=False))


def test_first_users_profiles_all_have_a_cost(machine: Machine) -> None:
    """Each of the four finds its model by its name and is checked."""
    found = _review(machine, CONF)
    assert [each.problem for each in found] == [None] * 4
    assert [each.model.name for each in found if each.model] == [each.section.name for each in found]


def test_cache_type_comes_from_the_description(machine: Machine) -> None:
    """A section without -ctk runs with its description's type, and a note says so."""
    (found,) = _review(machine, "[gpt-oss-120b]\nCTX_SIZE=8192\nEXTRA_ARGS=-np 1\n")
    assert found.now and found.now.assignment.settings.kv_type_k == "q8_0"
    assert any("taken from the description" in note for note in found.notes)


def test_defaults_beat_the_description(machine: Machine) -> None:
    """--defaults says what the profiles run with."""
    (found,) = _review(machine, "[gpt-oss-120b]\nEXTRA_ARGS=-np 1\n", "-ctk q4_0 -ctv q4_0 -c 4096")
    assert found.now and found.now.assignment.settings.kv_type_v == "q4_0"
    assert found.now.assignment.settings.ctx_tokens == 4096
    assert not any("taken from" in note for note in found.notes)


def test_section_beats_the_defaults(machine: Machine) -> None:
    """What a section says itself counts."""
    (found,) = _review(
        machine, "[gpt-oss-120b]\nCTX_SIZE=8192\nEXTRA_ARGS=-np 1 -ctk f16 -ctv f16\n", "-ctk q4_0"
    )
    assert found.now and found.now.assignment.settings.kv_type_k == "f16"


def test_fit_that_gives_up_is_said(machine: Machine) -> None:
    """FIT=on beside N_GPU_LAYERS=99 is costed as written, and advice says that the fit gives up."""
    found = _review(machine, CONF)[0]
    assert found.now and set(found.now.assignment.homes) == {"CUDA0", "CUDA1"}
    assert "fit-left-on" in [each.code for each in found.now.advice]


def test_unreadable_sections_do_not_stop_the_others(machine: Machine) -> None:
    """A stray line, a bad number, an unknown option value and an unknown model: each is one problem."""
    text = (
        "[a]\nnonsense\n[b]\nCTX_SIZE=many\n[glm-flash]\nEXTRA_ARGS=-ctk q9\n[never-heard-of]\nFIT=off\n"
        "[gpt-oss-120b]\nEXTRA_ARGS=-np 1\n"
    )
    found = _review(machine, text, b="glm-flash")
    assert [each.problem is None for each in found] == [False, False, False, False, True]
    assert "--map never-heard-of=MODEL" in str(found[3].problem)


def test_mapping_beats_the_name(machine: Machine) -> None:
    """--map says which model a section runs."""
    (found,) = _review(machine, "[coder]\nEXTRA_ARGS=-np 1\n", coder="qwen3-coder-q5")
    assert found.model and found.model.name == "qwen3-coder-q5"


def test_model_is_found_by_its_files_name(machine: Machine) -> None:
    """-m /somewhere/gpt-oss-120b-00001-of-00002.gguf is gpt-oss-120b, though the file is not here."""
    (found,) = _review(machine, "[x]\nEXTRA_ARGS=-np 1 -m /far/gpt-oss-120b-00001-of-00002.gguf\n")
    assert found.model and found.model.name == "gpt-oss-120b"


def test_automatic_slots_are_solved_as_one(machine: Machine) -> None:
    """Without -np four slots share the cache; one slot keeps all of the context."""
    (found,) = _review(machine, "[gpt-oss-120b]\nCTX_SIZE=8192\n")
    assert found.request.n_slots == 1 and found.request.ctx_tokens == 8192
    assert any("4 slots" in note for note in found.notes)


def test_mapping_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair given once is known the next time; a path is made absolute."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.gguf").write_bytes(b"GGUF")
    remember(["a=glm-flash", "b=my.gguf"])
    assert read_mapping() == {"a": "glm-flash", "b": str(tmp_path / "my.gguf")}
    assert remember(["a=glm-flash"]) is None


def test_pair_without_equals_is_refused() -> None:
    """--map takes SECTION=MODEL."""
    with pytest.raises(InputError, match="SECTION=MODEL"):
        read_mapping(["glm-flash"])


def test_applied_solution_is_found_equal(machine: Machine, tmp_path: Path) -> None:
    """What was applied is read back and is the solution; a second apply changes nothing."""
    conf, finder = parse_models_conf(CONF.encode()), ModelFinder()
    (before,) = review(conf, machine, finder, sections=conf.sections[:1], root=tmp_path)
    assert before.applied is None and before.best is not None
    applied = apply_choice(conf, "glm-flash-q4", before.best, date="2026-11-24")
    (after,) = review(applied.after, machine, finder, sections=applied.after.sections[:1], root=tmp_path)
    assert after.applied == "aggressive" and after.best == before.best
    again = apply_choice(applied.after, "glm-flash-q4", after.best, date="2026-11-25")
    assert not again.is_changed


def test_table_shows_now_and_place(machine: Machine, tmp_path: Path) -> None:
    """A row for what a profile costs, one for what place would do, and the problem of the unreadable one."""
    conf = parse_models_conf(f"[bad]\n?\n{CONF}".encode())
    found = list(review(conf, machine, ModelFinder(), sections=conf.sections[:2], root=tmp_path))
    lines = review_lines(found)
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["bad", "cannot"],
        ["glm-flash-q4", "now"],
        ["place", "22,291"],
    ]
    assert "  cannot be read: line 2: must be KEY=VALUE, [section] or a comment" in lines


def test_json_row_has_what_the_table_has(machine: Machine) -> None:
    """The row of an unsolved profile has its cost and no proposal."""
    row = profile_row(_review(machine, CONF)[1])
    assert row["now"]["splits"] == {"prompt": 3, "decode": 3} and row["place"] is None
    assert row["gain"] == {"decode_percent": None, "prompt_percent": None, "turn_s": None}


def test_section_of_a_model_is_found_by_what_it_runs(machine: Machine) -> None:
    """`apply MODEL` finds the section of another name that runs the model."""
    from placement.inputs.model_files.files import resolve_model

    conf = parse_models_conf(b"[coder]\nEXTRA_ARGS=-m qwen3-coder-q5.gguf\n[glm-flash]\nFIT=off\n")
    section = section_of(conf, "qwen3-coder-q5", resolve_model("qwen3-coder-q5"), ModelFinder())
    assert section.name == "coder"


def test_request_keeps_the_sections_context_and_slots(machine: Machine) -> None:
    """What is solved for in a section's place has its context, slots and cache type."""
    from placement.inputs.model_files.files import resolve_model

    section = parse_models_conf(b"[x]\nCTX_SIZE=16384\nEXTRA_ARGS=-np 2 -ctk f16 -ctv f16\n").sections[0]
    asked, _ = section_request(section, resolve_model("glm-flash"), machine, Defaults(), Request())
    assert (asked.ctx_tokens, asked.n_slots, asked.kv_type) == (16384, 2, "f16")


def _asked(model_name: str, machine: Machine, extra: str) -> Request:
    """What is solved for in place of a section with these arguments."""
    from placement.inputs.model_files.files import resolve_model

    section = parse_models_conf(f"[x]\nCTX_SIZE=16384\nEXTRA_ARGS=-np 1 {extra}\n".encode()).sections[0]
    return section_request(section, resolve_model(model_name), machine, Defaults(), Request())[0]


def test_request_keeps_both_cache_types(machine: Machine) -> None:
    """A section with K q8_0 and V f16 is solved with these, not with less memory."""
    from placement.inputs.model_files.files import resolve_model

    asked = _asked("gpt-oss-120b", machine, "-ctk q8_0 -ctv f16")
    settings = make_problem(resolve_model("gpt-oss-120b"), machine, asked)[0].settings
    assert settings.kv_types == ("q8_0", "f16")


def test_request_has_one_type_where_the_engine_takes_one(machine: Machine) -> None:
    """Latent attention does not start with two types: K's is solved with."""
    from placement.inputs.model_files.files import resolve_model

    asked = _asked("glm-flash", machine, "-ctk q8_0 -ctv f16")
    assert make_problem(resolve_model("glm-flash"), machine, asked)[0].settings.kv_types == ("q8_0",)


def test_launches_of_a_conf_say_each_option_once(machine: Machine) -> None:
    """A key that EXTRA_ARGS overrules is not exported."""
    conf = parse_models_conf(b"[glm-flash]\nCTX_SIZE=4096\nEXTRA_ARGS=-c 8192 --jinja -m /x/y.gguf\n")
    (launch,) = launches_of_conf(conf, machine, ModelFinder({"glm-flash": "glm-flash"}), Defaults())
    assert launch.args == ("-ctk", "q8_0", "-ctv", "q8_0", "-c", "8192", "--jinja")
    assert launch.model_path == "/x/y.gguf"


def test_choice_by_an_unknown_name_is_refused() -> None:
    """The error names the solutions that there are."""
    row = {"model": "m", "solutions": [{"name": "aggressive"}]}
    with pytest.raises(InputError, match="known: aggressive"):
        choice_of(row, "best")
    assert choice("glm-flash").name == "aggressive"


MACHINE = ["--machine", "rtx4090-rtx5070ti"]


def _place(*arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, *MACHINE])


@pytest.fixture
def conf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first user's file in a folder of its own, which is the current one."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "models.conf"
    path.write_text(CONF)
    return path


def test_unreadable_section_is_exit_code_2(conf_file: Path) -> None:
    """The table still has the others."""
    conf_file.write_text(f"{CONF}[bad]\n?\n")
    done = _place("profiles", "models.conf", "--no-solve")
    assert done.exit_code == 2 and "gpt-oss-120b    now" in done.output


def test_dry_run_prints_the_diff_and_writes_nothing(conf_file: Path) -> None:
    """The file is as it was, and there is no backup."""
    done = _place("apply", "glm-flash-q4", "models.conf", "--dry-run", "--engine", "off")
    assert "\n-FIT=on\n" in done.output and "\n+FIT=off\n" in done.output
    assert conf_file.read_text() == CONF and not conf_file.with_name("models.conf.bak").exists()


def test_apply_then_profiles_then_apply(conf_file: Path) -> None:
    """Written once; then `profiles` finds it, and a second apply writes nothing."""
    assert "is now aggressive" in _place("apply", "glm-flash-q4", "models.conf", "--engine", "off").output
    written = conf_file.read_bytes()
    seen = _place("profiles", "models.conf", "--section", "glm-flash-q4").output
    assert "this profile is its solution aggressive" in seen
    assert "nothing written" in _place("apply", "glm-flash-q4", "models.conf", "--engine", "off").output
    assert conf_file.read_bytes() == written


def test_profiles_come_out_as_a_preset(conf_file: Path) -> None:
    """All four sections, with the file that --file names for one."""
    done = _place("export-as", "preset", "--conf", "models.conf", "--file", "glm-flash=/m/glm.gguf")
    assert done.output.count("\nmodel = ") == 4 and "\nmodel = /m/glm.gguf\n" in done.output


def test_explain_draws_given_arguments(conf_file: Path) -> None:
    """`explain --args` needs no solve, and prints no colour where it is no terminal."""
    done = _place("explain", "gpt-oss-120b", "--args", r"-c 8192 -ngl 37 -ts 25,12 -np 1 -ot exps=CPU")
    assert done.exit_code == 0 and "experts   " + "c" * 36 in done.output and "\x1b" not in done.output
