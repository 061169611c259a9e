"""models.conf in: what is read, and that nothing is lost."""

import pytest
from first_user import CONF
from hypothesis import given
from hypothesis import strategies as st

from placement.configs.models_conf.models_conf import parse_models_conf, quoted, read_models_conf, words
from placement.errors import InputError
from placement.llamacpp.arguments import parse

_LINES = st.one_of(
    st.sampled_from(
        ["[a]", "[b] # c", "[broken", "CTX_SIZE=4096", "EXTRA_ARGS=-np 1 \\", "# note", "", "  ", "=x"]
    ),
    st.text(st.characters(exclude_characters="\n\0", exclude_categories=("Cs",)), max_size=30),
)


def _tokens(text: str) -> list[str]:
    return parse_models_conf(text.encode()).sections[0].tokens()


def test_first_users_sections_by_name() -> None:
    """The four sections are read in their order, without a problem."""
    conf = parse_models_conf(CONF.encode())
    assert [section.name for section in conf.sections] == [
        "glm-flash-q4",
        "glm-flash",
        "gpt-oss-120b",
        "qwen3-coder-q5",
    ]
    assert not any(section.problems for section in conf.sections)


def test_backslashes_are_literal() -> None:
    """A regular expression of the first user arrives with its backslashes."""
    tokens = parse_models_conf(CONF.encode()).section("gpt-oss-120b").tokens()
    assert tokens[-1] == r"blk\.([0-9]|10)\.=CUDA0,blk\.(1[1-3])\.=CUDA1,exps=CPU"
    assert [each.pattern for each in parse(tokens).overrides] == [
        r"blk\.([0-9]|10)\.",
        r"blk\.(1[1-3])\.",
        "exps",
    ]


def test_keys_become_the_options_that_they_stand_for() -> None:
    """CTX_SIZE, N_GPU_LAYERS and FIT come before EXTRA_ARGS, as -c, -ngl and -fit."""
    tokens = parse_models_conf(CONF.encode()).section("glm-flash").tokens()
    assert tokens[:6] == ["-c", "131072", "-ngl", "99", "-fit", "on"]
    assert tokens[6:9] == ["--jinja", "-np", "1"]


def test_extra_args_win_over_keys() -> None:
    """An option in EXTRA_ARGS overrules its key."""
    assert parse(_tokens("[a]\nCTX_SIZE=4096\nEXTRA_ARGS=-c 8192\n")).ctx_tokens == 8192


def test_last_of_duplicated_keys_counts() -> None:
    """Of two CTX_SIZE the last counts, and the section says so."""
    section = parse_models_conf(b"[a]\nCTX_SIZE=1\nCTX_SIZE=2\n").sections[0]
    assert section.tokens() == ["-c", "2"]
    assert section.problems == ("line 3: CTX_SIZE is given again; the last one counts",)


def test_engine_variable_names_are_keys_too() -> None:
    """LLAMA_ARG_CTX_SIZE is CTX_SIZE."""
    assert _tokens("[a]\nLLAMA_ARG_CTX_SIZE=512\n") == ["-c", "512"]


def test_comment_after_a_value_is_not_part_of_it() -> None:
    """A word that begins with # ends the value."""
    assert _tokens("[a]\nCTX_SIZE=512  # small\nEXTRA_ARGS=--jinja # -np 4\n") == ["-c", "512", "--jinja"]


def test_quoted_whole_value() -> None:
    """Quotes around all of EXTRA_ARGS are no part of it."""
    assert _tokens('[a]\nEXTRA_ARGS="--temp 1.0 -ot blk\\.1=CPU"\n') == [
        "--temp",
        "1.0",
        "-ot",
        r"blk\.1=CPU",
    ]


def test_quotes_inside_a_word_are_literal() -> None:
    """A JSON value without spaces needs no quoting."""
    assert [word.value for word in words('--kw {"a":false} \'{"b": 1}\'')] == [
        "--kw",
        '{"a":false}',
        '{"b": 1}',
    ]


def test_unclosed_quote_is_refused() -> None:
    """A word that opens a quote and does not close it is an error that names it."""
    with pytest.raises(InputError, match="closed quotes"):
        words("--alias 'x y")


def test_continued_lines_are_one_value() -> None:
    """A backslash at the end of a line continues it."""
    text = "[a]\nEXTRA_ARGS=--jinja \\\n  -np 1 \\\n  -c 8\nFIT=off\n"
    assert _tokens(text) == ["-fit", "off", "--jinja", "-np", "1", "-c", "8"]


def test_unreadable_line_is_its_sections_problem() -> None:
    """A stray line names its number in its section; the other sections have no problem."""
    conf = parse_models_conf(b"[a]\nwhat is this\n[b]\nCTX_SIZE=1\n")
    assert conf.sections[0].problems == ("line 2: must be KEY=VALUE, [section] or a comment",)
    assert conf.sections[1].problems == ()


def test_broken_header_keeps_its_entries_to_itself() -> None:
    """Entries after an unreadable header do not join the section before it."""
    conf = parse_models_conf(b"[a]\nCTX_SIZE=1\n[b\nCTX_SIZE=2\n")
    assert [section.tokens() for section in conf.sections] == [["-c", "1"], ["-c", "2"]]
    assert conf.sections[1].problems == ("line 3: must be [name]",)


def test_byte_order_mark_does_not_hide_the_first_section() -> None:
    """A BOM before the first header is skipped, and kept."""
    conf = parse_models_conf(b"\xef\xbb\xbf[a]\r\nCTX_SIZE=1\r\n")
    assert conf.sections[0].name == "a" and conf.sections[0].tokens() == ["-c", "1"]
    assert conf.to_bytes().startswith(b"\xef\xbb\xbf[a]\r\n")


def test_utf16_is_refused() -> None:
    """A file with NUL bytes is no text."""
    with pytest.raises(InputError, match="UTF-8"):
        parse_models_conf("[a]".encode("utf-16"))


def test_missing_file_is_an_input_error(tmp_path: object) -> None:
    """A file that is not there is said in one line."""
    with pytest.raises(InputError, match="cannot be read"):
        read_models_conf(f"{tmp_path}/none.conf")


def test_section_named_twice_is_refused_by_name() -> None:
    """Asking for a section that stands twice names both lines."""
    with pytest.raises(InputError, match="lines 1, 2"):
        parse_models_conf(b"[a]\n[a]\n").section("a")


@given(st.lists(_LINES, max_size=12), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_text_is_kept_byte_for_byte(lines: list[str], newline: str, is_ended: bool) -> None:
    """Whatever is read is written back as it was."""
    data = (newline.join(lines) + (newline if is_ended else "")).encode()
    assert parse_models_conf(data).to_bytes() == data


@given(st.binary(max_size=60).filter(lambda data: b"\0" not in data))
def test_any_bytes_are_kept(data: bytes) -> None:
    """Bytes that are no UTF-8 survive."""
    assert parse_models_conf(data).to_bytes() == data


@given(st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=("Cs", "Cc", "Z")), max_size=20))
def test_quoted_words_read_back(value: str) -> None:
    """Whatever a word can be written as, it is read back."""
    try:
        written = quoted(f"{value} {value}")
    except InputError:
        assert "'" in value and '"' in value
        return
    assert [word.value for word in words(f"-a {written} -b")] == ["-a", f"{value} {value}", "-b"]
