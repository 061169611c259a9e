"""A choice written into a models.conf: what changes, what does not, and that it reads back."""

import dataclasses
import difflib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from first_user import CONF, GPT_OT, choice
from hypothesis import given
from hypothesis import strategies as st

from placement.configs.models_conf.apply import Applied, apply_choice
from placement.configs.models_conf.choice import Measured
from placement.configs.models_conf.measured import measured_of
from placement.configs.models_conf.models_conf import parse_models_conf, read_models_conf
from placement.errors import InputError
from placement.inputs.identity import machine_identity
from placement.inputs.machine import Machine
from placement.inputs.machine_files import resolve_machine
from placement.inputs.model_files.files import resolve_model
from placement.llamacpp.arguments import parse
from placement.measure.records.log import RunLog
from placement.measure.records.schema import DevicePeak, Key, Record
from placement.solve.request import Request
from placement.solve.solve import make_problem
from placement.solve.store import solution_folder

DATE = "2026-11-24"


def _applied(text: str | bytes, name: str, **changed: object) -> Applied:
    data = text if isinstance(text, bytes) else text.encode()
    return apply_choice(parse_models_conf(data), name, choice(name, **changed), date=DATE)


def _changed_lines(applied: Applied) -> list[str]:
    """The lines that went or came, the comment block left out."""
    pairs = difflib.ndiff(applied.before.lines, applied.after.lines)
    return [line.rstrip() for line in pairs if line[0] in "+-" and not line.startswith("+ #")]


def test_only_what_had_to_change_changes() -> None:
    """Of the first user's gpt-oss section one line changes: 99 layers already mean all of them."""
    before = r"blk\.([0-9]|10)\.=CUDA0,blk\.(1[1-3])\.=CUDA1,exps=CPU"
    head = "EXTRA_ARGS=--jinja -np 1 --temp 1.0 --top-p 1.0 -b 2048 -ub 2048 -ot "
    tail = " -ts 25,12 -lm none -ctk q8_0 -ctv q8_0 -fa on"
    assert _changed_lines(_applied(CONF, "gpt-oss-120b")) == [f"- {head}{before}", f"+ {head}{GPT_OT}{tail}"]


def test_fit_is_switched_off_in_its_own_key() -> None:
    """FIT=on becomes FIT=off, and EXTRA_ARGS does not say it again."""
    changed = _changed_lines(_applied(CONF, "glm-flash"))
    assert changed[:2] == ["- FIT=on", "+ FIT=off"]
    assert not any("-fit" in line for line in changed)


@pytest.mark.parametrize("name", ["glm-flash-q4", "glm-flash", "gpt-oss-120b", "qwen3-coder-q5"])
def test_what_was_applied_reads_back(name: str) -> None:
    """The section then says what the choice says about placement, and its other arguments as before."""
    before = parse_models_conf(CONF.encode()).section(name)
    said = parse(_applied(CONF, name).after.section(name).tokens())
    meant = dataclasses.replace(parse(choice(name).args), n_gpu_layers=99)
    assert dataclasses.replace(said, other=()) == meant
    assert said.other == parse(before.tokens()).other


@pytest.mark.parametrize("name", ["glm-flash-q4", "glm-flash", "gpt-oss-120b", "qwen3-coder-q5"])
def test_applying_twice_changes_nothing(name: str) -> None:
    """Not even the date of a later day."""
    once = _applied(CONF, name).after
    again = apply_choice(once, name, choice(name), date="2027-01-01")
    assert not again.is_changed and again.diff() == ""


def test_other_sections_are_untouched() -> None:
    """Before and after the section each byte stays: CRLF, no UTF-8, no last newline."""
    other = b"# \xff head\r\n\r\n[first]\r\nX = 1\n\n"
    last = b"\r\n[last]\nCTX_SIZE=1\n# no end"
    section = b"[glm-flash]\r\nCTX_SIZE=4096\r\nEXTRA_ARGS=--jinja\r\n"
    after = _applied(other + section + last, "glm-flash").after.to_bytes()
    assert after.startswith(other) and after.endswith(last)


def test_block_and_lines_have_the_sections_line_end() -> None:
    """In a CRLF section every line ends so."""
    after = _applied("[glm-flash]\r\nCTX_SIZE=4096\r\nEXTRA_ARGS=--jinja\r\n", "glm-flash").after.to_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") > 10


def test_file_without_last_newline_keeps_it_so() -> None:
    """The last line, though rewritten, still has no end."""
    after = _applied("[glm-flash]\nEXTRA_ARGS=--jinja", "glm-flash").after.to_bytes()
    assert after.endswith(b"-fit off")


def test_old_lines_stay_as_comments() -> None:
    """The replaced lines are in the block, as they were."""
    after = _applied(CONF, "glm-flash").after.to_bytes().decode()
    assert (
        "# before:\n#   FIT=on\n#   EXTRA_ARGS=--jinja -np 1 --temp 1.0 --top-p 0.95 --min-p 0.01\n" in after
    )


def test_block_says_why() -> None:
    """Prediction, measurement, splits, speeds, engine build, date and criteria are in the block."""
    run = Measured({"CUDA0": 22800.0}, 3, 2, 118.2, 700.0, "b11434", "2026-11-20")
    conf = parse_models_conf(CONF.encode())
    text = (
        apply_choice(conf, "glm-flash", choice("glm-flash"), date=DATE, measured=run)
        .after.to_bytes()
        .decode()
    )
    for line in (
        "# why: takes least time within every cap",
        "# memory in MiB, estimated: CUDA0 23,000 of 24,000, Host 700 of 61,440",
        "# splits, estimated: 2 a token, 3 a prompt batch",
        "# speed, estimated: decode 120.4 t/s, prompt 751 t/s",
        "# measured: CUDA0 22,800 MiB; 2 splits a token; decode 118.2 t/s, prompt 700 t/s; 2026-11-20",
        "# engine: llama.cpp b11434; place",
        f"# date: {DATE}",
    ):
        assert line in text


def test_another_choice_keeps_the_users_own_lines() -> None:
    """A second, different choice replaces the block, and the lines of before the first stay in it."""
    once = _applied(CONF, "glm-flash").after
    args = tuple("256" if arg == "512" else arg for arg in choice("glm-flash").args)
    twice = (
        apply_choice(once, "glm-flash", choice("glm-flash", args=args), date=DATE).after.to_bytes().decode()
    )
    assert twice.count("# >>> place") == 1 and twice.count("#   FIT=on") == 1
    assert "#   EXTRA_ARGS=--jinja -np 1 --temp 1.0 --top-p 0.95 --min-p 0.01\n# <<<" in twice


def test_lines_edited_by_hand_since_are_kept_too() -> None:
    """What someone wrote after an earlier apply is not lost to the next."""
    once = _applied(CONF, "glm-flash").after.to_bytes().replace(b"-ub 512", b"-ub 333")
    after = _applied(once, "glm-flash").after.to_bytes().decode()
    kept = [line for line in after.splitlines() if line.startswith("#   ")]
    assert len(kept) == 3 and "-ub 333" in kept[-1]


def test_option_keeps_the_name_it_was_written_with() -> None:
    """--ubatch-size stays --ubatch-size."""
    after = _applied("[glm-flash]\nEXTRA_ARGS=--ubatch-size 64 --temp 1\n", "glm-flash").after
    assert after.section("glm-flash").tokens()[:4] == ["--ubatch-size", "512", "--temp", "1"]


def test_placement_that_the_choice_lacks_goes() -> None:
    """Whole-card and expert options of the old line are gone; threads and sampler stay."""
    text = "[glm-flash]\nTENSOR_SPLIT=1,1\nEXTRA_ARGS=-sm none -mg 0 -t 8 --cpu-moe --top-k 1 -ncmoe 3\n"
    tokens = _applied(text, "glm-flash").after.section("glm-flash").tokens()
    assert not {"-sm", "-mg", "--cpu-moe", "-ncmoe"} & set(tokens)
    assert tokens[:6] == ["-ts", "32,16", "-t", "8", "--top-k", "1"]


def test_section_without_arguments_gets_a_line() -> None:
    """EXTRA_ARGS is added after the last entry, before the blank line that follows."""
    after = _applied("[glm-flash]\nCTX_SIZE=131072\n\n[b]\n", "glm-flash").after.to_bytes().decode()
    assert after.endswith("CTX_SIZE=131072\nEXTRA_ARGS=-ngl 48 -ts 32,16 -b 2048 -ub 512 -np 1 -ctk q8_0 "
                          "-ctv q8_0 -fa on -fit off\n\n[b]\n")  # fmt: skip


def test_empty_last_section_without_newline() -> None:
    """A file that ends with the bare header is completed."""
    after = _applied("[glm-flash]", "glm-flash").after
    assert parse(after.section("glm-flash").tokens()).tensor_split == (32.0, 16.0)


def test_quoted_value_stays_quoted() -> None:
    """EXTRA_ARGS="…" keeps its quotes and its comment."""
    after = (
        _applied('[glm-flash]\nEXTRA_ARGS="--jinja -ub 64"  # mine\n', "glm-flash").after.to_bytes().decode()
    )
    assert 'EXTRA_ARGS="--jinja -ub 512 -ngl 48' in after and after.endswith('-fit off"  # mine\n')


def test_unknown_section_is_refused() -> None:
    """The error names the sections that there are."""
    with pytest.raises(InputError, match="glm-flash-q4, glm-flash"):
        apply_choice(parse_models_conf(CONF.encode()), "none", choice("glm-flash"), date=DATE)


def test_writing_is_atomic_with_a_backup(tmp_path: Path) -> None:
    """The file as it was is beside it, its mode is kept, and a link to it stays a link."""
    path, link = tmp_path / "real.conf", tmp_path / "models.conf"
    path.write_text(CONF)
    path.chmod(0o600)
    link.symlink_to(path)
    applied = apply_choice(read_models_conf(link), "glm-flash", choice("glm-flash"), date=DATE)
    assert applied.write() and link.is_symlink()
    assert path.read_bytes() == applied.after.to_bytes()
    assert (tmp_path / "real.conf.bak").read_text() == CONF
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_file_changed_meanwhile_is_left_alone(tmp_path: Path) -> None:
    """What someone else wrote since it was read is not lost."""
    path = tmp_path / "models.conf"
    path.write_text(CONF)
    applied = apply_choice(read_models_conf(path), "glm-flash", choice("glm-flash"), date=DATE)
    path.write_text("other")
    with pytest.raises(InputError, match="has changed"):
        applied.write()
    assert path.read_text() == "other"


_VALUES = st.sampled_from(["131072", "on", "off", "", "99", "1,1", "  7  # c", '"8"'])
_KEYS = st.sampled_from(
    ["CTX_SIZE", "N_GPU_LAYERS", "FIT", "TENSOR_SPLIT", "N_PARALLEL", "MODEL", "NOTE", "export UBATCH"]
)
_WORDS = st.sampled_from(
    [
        *(
            "-ngl 5",
            "-ts 1,2",
            "--jinja",
            "-fa",
            "-fa on",
            "--temp 1.0",
            "-ot a=CPU",
            "-ot 'b c=CPU'",
            "-nkvo",
        ),
        *("--mmap", "-np 4", "--top-k 40", "-c 8", "--alias 'x y'", "-t 4", "--flash-attn off"),
    ]
)
_ENTRIES = st.one_of(
    st.builds("{}={}".format, _KEYS, _VALUES),
    st.lists(_WORDS, max_size=6).map(lambda parts: "EXTRA_ARGS=" + " ".join(parts)),
    st.lists(_WORDS, min_size=2, max_size=4).map(lambda parts: "EXTRA_ARGS=" + " \\\n  ".join(parts)),
    st.sampled_from(["", "# note", "; note", "  # indented"]),
)


@given(
    st.lists(_ENTRIES, max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from(["", "[z]\nX=1"]),
)
def test_any_section_takes_the_choice(entries: list[str], newline: str, is_ended: bool, rest: str) -> None:
    """Whatever the section said: it reads back as selected, its other arguments stay, and twice is once."""
    text = newline.join(
        ["# top", "[glm-flash]", *entries, ""] if is_ended or rest else ["[glm-flash]", *entries]
    )
    data = text.replace("\n", newline).replace("\r\r", "\r").encode() + rest.encode()
    conf = parse_models_conf(data)
    try:
        before = parse(conf.section("glm-flash").tokens())
    except InputError:
        return  # a section that cannot be read is refused as it is
    applied = apply_choice(conf, "glm-flash", choice("glm-flash"), date=DATE)
    said = parse(applied.after.section("glm-flash").tokens())
    assert (said.tensor_split, said.ubatch_tokens, said.overrides) == ((32.0, 16.0), 512, ())
    assert (said.other, said.n_threads, said.model_path) == (
        before.other,
        before.n_threads,
        before.model_path,
    )
    assert applied.after.to_bytes().endswith(rest.encode())
    assert applied.after.to_bytes().endswith(b"\n") is data.endswith(b"\n") or not entries
    again = apply_choice(applied.after, "glm-flash", choice("glm-flash"), date="2030-01-01")
    assert again.after.to_bytes() == applied.after.to_bytes()


@pytest.fixture
def measured(tmp_path: Path) -> Callable[[Machine], Measured | None]:
    """What a machine's runs say, where another of the shipped name has run the choice and one thing more."""
    ran, model, request = resolve_machine("rtx4090-rtx5070ti"), resolve_model("glm-flash"), Request()
    folder = solution_folder(tmp_path, make_problem(model, ran, request)[0])
    mine = choice("glm-flash")
    key = Key(
        engine_build="b11434", engine_fingerprint="x", model_digest=model.digest, machine=machine_identity(ran),
        plan="p",
    )  # fmt: skip
    other = (*mine.args, "-ub", "64")
    for arguments, peak, phase in (
        (mine.args, 23001.0, "start"),
        (mine.args, 22000.0, "stop"),
        (other, 9.0, "start"),
    ):
        record = Record(
            campaign="c",
            at="2026-11-23T10:00:00+00:00",
            key=key,
            round=1,
            candidate="aggressive",
            role="solution",
            run_id=arguments[-1],
            arguments=(*arguments, "--jinja"),
            phase=phase,
            outcome="ok",
            wall_s=1.0,
            devices={"CUDA0": DevicePeak(peak_mib=peak)},
            splits_decode=3,
        )
        RunLog(folder).append(record)
    return lambda machine: measured_of(mine, model, machine, request, tmp_path)


@pytest.mark.parametrize("name", ["rtx4090-rtx5070ti", "renamed"])
def test_measurements_come_from_the_run_records(
    measured: Callable[[Machine], Measured | None], name: str
) -> None:
    """Of all runs on this machine, whatever its name, those of exactly this placement count, with the newest
    one's date and build."""
    result = measured(replace(resolve_machine("rtx4090-rtx5070ti"), name=name))
    assert result is not None and result.memory_mib == {"CUDA0": 23001.0}
    assert (result.engine_build, result.date, result.splits_decode) == ("b11434", "2026-11-23", 3)


def test_measurements_of_a_namesake_do_not_count(measured: Callable[[Machine], Measured | None]) -> None:
    """Other hardware under the same name has measured nothing here."""
    machine = resolve_machine("rtx4090-rtx5070ti")
    assert measured(replace(machine, devices=machine.devices[::-1])) is None


def test_without_runs_nothing_is_measured(tmp_path: Path) -> None:
    """No folder, no measurement."""
    machine, model = resolve_machine("rtx4090-rtx5070ti"), resolve_model("glm-flash")
    assert measured_of(choice("glm-flash"), model, machine, Request(), tmp_path) is None
