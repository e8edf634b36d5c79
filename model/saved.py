"""A trained network on disk: weights in safetensors, everything else in JSON; nothing is ever unpickled."""

import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from data.files import write_whole
from model.config import ConfigError, NetworkConfig
from model.cost import count_cost
from model.network import BlockNetwork, build_network

WEIGHTS, CONFIG, METRICS = "model.safetensors", "config.json", "metrics.json"
FORMAT = 1

# Far above any network of this project; a file that claims more is refused before anything is built from it.
MOST_BYTES = 4 * 2**30
MOST_LAYERS = 1_000
LARGEST_NUMBER = 2**20


@dataclass(frozen=True)
class SavedModel:
    """A network with the names of its classes.

    Attributes:
        network: in eval mode.
        classes: names in the order of the logits.
        flip: it was chosen with test-time augmentation, and predicts with it (`model.quality.logits_of`).
        about: everything else in ``config.json``, as passed to `save_model`.
    """

    network: BlockNetwork
    classes: tuple[str, ...]
    flip: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


def save_model(
    folder: Path,
    network: BlockNetwork,
    classes: tuple[str, ...],
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``metrics.json``; each whole or not at all.

    Args:
        folder: created if it is absent.
        network: on any device.
        classes: names in the order of the logits.
        about: all else that belongs in ``config.json``, such as how the network was trained. A key ``predict`` says
            how the network predicts: ``{"flip": True}`` with test-time augmentation.
        metrics: what was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    content = save(weights, metadata={"format": "pt"})  # save_file would make it readable by its owner only
    write_whole(folder / WEIGHTS, content)
    config = {
        "format": FORMAT,
        "input": "uint8 RGB images, shape (n, 3, size, size); the network scales them itself",
        "network": asdict(network.config),
        "classes": list(classes),
        "sha256": hashlib.sha256(content).hexdigest(),
        **about,
    }
    write_json(folder / CONFIG, config)
    write_json(folder / METRICS, metrics)


def load_model(folder: Path, device: torch.device | str = "cpu") -> SavedModel:
    """Load what `save_model` wrote, after checking that it is unchanged.

    Raises:
        ConfigError: a file is missing, was altered or is not what it should be.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} holds no saved model: {name} is missing")
    try:
        saved = _load(folder)
    except (OSError, ValueError, RecursionError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"the saved model in {folder} is damaged: {' '.join(str(error).split())}") from error
    saved.network.to(device)  # not above: a missing device is not damage
    return saved


OWN_KEYS = {"format", "input", "network", "classes", "sha256"}


def _load(folder: Path) -> SavedModel:
    """The model, on the CPU; ValueError and others that `load_model` names if something is wrong with it."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} holds no table")
    if missing := sorted(OWN_KEYS - config.keys()):
        raise ValueError(f"{CONFIG} has no {', '.join(missing)}")
    if config["format"] != FORMAT:
        raise ValueError(f"{CONFIG} has format {reprlib.repr(config['format'])}; this version reads format {FORMAT}")
    described = _network_config(config["network"])
    classes, flip = _classes(config["classes"], described.classes), _flip(config.get("predict", {"flip": False}))

    content = _checked_weights(folder / WEIGHTS, config["sha256"])
    parameters = count_cost(described).parameters
    if 4 * parameters > len(content):
        raise ValueError(f"the network in {CONFIG} has {parameters:,} parameters, more than {WEIGHTS} can hold")
    network = build_network(described)
    tensors, expected = load(content), network.state_dict()
    wrong = [name for name in expected.keys() | tensors.keys() if _form(tensors.get(name)) != _form(expected.get(name))]
    if wrong:
        raise ValueError(f"{WEIGHTS} is of another network than {CONFIG}: {len(wrong)} tensors differ, as {min(wrong)}")
    network.load_state_dict(tensors)
    about = {key: value for key, value in config.items() if key not in OWN_KEYS}
    return SavedModel(network.eval(), classes, flip, about)


def _checked_weights(path: Path, expected: object) -> bytes:
    """The file's content, which is what was written: hashed and used are the same bytes."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes, more than the {MOST_BYTES:,} that a model may have")
    content = path.read_bytes()
    checksum = hashlib.sha256(content).hexdigest()
    if checksum != expected:
        raise ValueError(
            f"{path.name} does not match its checksum in {CONFIG}: its SHA-256 is {checksum[:16]}..., "
            f"not {reprlib.repr(expected)}; it was altered or cut short, take a sound copy"
        )
    return content


def _form(tensor: torch.Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _network_config(table: object) -> NetworkConfig:
    """The description of a network in a table of JSON, with every name and type as `NetworkConfig` has them."""
    if not isinstance(table, dict):
        raise ValueError(f"network is {reprlib.repr(table)}, not a table")
    hints = get_type_hints(NetworkConfig)
    if unknown := sorted(table.keys() - hints.keys()):
        raise ValueError(f"network has unknown settings: {reprlib.repr(unknown)}")
    required = {field.name for field in fields(NetworkConfig) if field.default is MISSING}
    if missing := sorted(required - table.keys()):
        raise ValueError(f"network has no {', '.join(missing)}")
    return NetworkConfig(**{name: _as_kind(value, hints[name], f"network.{name}") for name, value in table.items()})


def _as_kind(value: object, kind: Any, name: str) -> Any:
    """A value of JSON as one of a kind of `NetworkConfig`'s: bool, number, choice or tuple of one of these."""
    if get_origin(kind) is tuple:
        if isinstance(value, list) and len(value) <= MOST_LAYERS:
            return tuple(_as_kind(item, get_args(kind)[0], name) for item in value)
        expected = f"a list of at most {MOST_LAYERS:,}"
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        expected = f"one of {', '.join(get_args(kind))}"
    elif kind is int:
        if type(value) is int and 1 <= value <= LARGEST_NUMBER:
            return value
        expected = f"a whole number from 1 to {LARGEST_NUMBER:,}"
    else:
        assert kind is bool
        if isinstance(value, bool):
            return value
        expected = "true or false"
    raise ValueError(f"{name} is {reprlib.repr(value)}, not {expected}")


def _classes(names: object, count: int) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes is {reprlib.repr(names)}, not a list of names")
    if len(names) != count:
        raise ValueError(f"there are {len(names)} classes, but the network tells {count} apart")
    return tuple(names)


def _flip(table: object) -> bool:
    match table:
        case {"flip": bool(flip), **others} if not others:
            return flip
    raise ValueError(f'predict is {reprlib.repr(table)}, not {{"flip": true}} or {{"flip": false}}')


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")
