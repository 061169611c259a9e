"""A launch → a Docker Compose service.

Compose replaces `$NAME` and `${NAME}` in every value, so each `$` is doubled; the command is a list, which no
shell splits again.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from placement.configs.formats.launch import Launch, check_tokens, comment_lines
from placement.configs.formats.yaml import yaml_text

IMAGE = "ghcr.io/ggml-org/llama.cpp:server-cuda"
_INSIDE = "/models"


def compose(launch: Launch, image: str = IMAGE) -> str:
    """A Compose file with one service that has every GPU; the model's folder is mounted read-only.

    Raises:
        InputError: an argument holds a control character.
    """
    check_tokens("a Compose file", [launch.name, image, *launch.tokens])
    path = PurePosixPath(launch.model_path)
    command = [
        "-m",
        f"{_INSIDE}/{path.name}",
        *launch.args,
        *launch.extra_args,
        "--host",
        "0.0.0.0",
        "--port",
        "8080",
    ]
    lines = [
        *comment_lines(launch),
        "services:",
        f"  {_service_name(launch.name)}:",
        f"    image: {_value(image)}",
        "    command:",
        *(f"      - {_value(token)}" for token in command),
        "    ports:",
        f"      - {_value(f'{launch.host}:{launch.port}:8080')}",
        "    volumes:",
        "      - type: bind",
        f"        source: {_value(str(path.parent))}",
        f"        target: {_value(_INSIDE)}",
        "        read_only: true",
        "    deploy:",
        "      resources:",
        "        reservations:",
        "          devices:",
        "            - driver: nvidia",
        "              count: all",
        "              capabilities: [gpu]",
        "    restart: unless-stopped",
    ]
    return "\n".join([*lines, ""])


def _value(text: str) -> str:
    return yaml_text(text.replace("$", "$$"))


def _service_name(name: str) -> str:
    """A service name: letters, digits, dots, dashes and underscores."""
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in name)
    return yaml_text(kept.strip("._-") or "llama-server")
