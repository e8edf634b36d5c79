"""A trained network on disk: weights in safetensors, everything else in JSON; nothing is ever unpickled."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from model.config import ConfigError, NetworkConfig
from model.network import BlockNetwork, build_network

WEIGHTS, CONFIG, METRICS = "model.safetensors", "config.json", "metrics.json"
FORMAT = 1


@dataclass(frozen=True)
class SavedModel:
    """A network with the names of its classes."""

    network: BlockNetwork
    classes: tuple[str, ...]


def save_model(
    folder: Path,
    network: BlockNetwork,
    classes: tuple[str, ...],
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``metrics.json``; each whole or not at all.

    Args:
        folder: made where it is absent.
        network: on any device.
        classes: names in the order of the logits.
        about: whatever else belongs into ``config.json``, such as how the network was trained.
        metrics: what was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    partial = folder / f".{WEIGHTS}.partial"
    partial.write_bytes(save(weights, metadata={"format": "pt"}))  # save_file would make it readable to its owner only
    partial.replace(folder / WEIGHTS)
    config = {
        "format": FORMAT,
        "input": "uint8 RGB images, shape (n, 3, size, size); the network scales them itself",
        "network": asdict(network.config),
        "classes": list(classes),
        **about,
    }
    write_json(folder / CONFIG, config)
    write_json(folder / METRICS, metrics)


def load_model(folder: Path, device: torch.device | str = "cpu") -> SavedModel:
    """Load what `save_model` wrote.

    Raises:
        ConfigError: a file is missing or is not what it should be.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} holds no saved model: {name} is missing")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        table = config["network"]
        network = build_network(
            NetworkConfig(
                **{
                    **table,
                    "widths": tuple(table["widths"]),
                    "pooled": tuple(table["pooled"]),
                    "head": tuple(table["head"]),
                }
            ),
            device=device,
        )
        network.load_state_dict(load_file(folder / WEIGHTS, device=str(device)))
        return SavedModel(network.eval(), tuple(config["classes"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"the saved model in {folder} is damaged: {' '.join(str(error).split())}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
