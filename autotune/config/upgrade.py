"""Configurations of earlier versions' studies, brought up to date."""

from typing import Any

# Old and new values of `_target_`.
MOVED = {
    "autotune.cnn_dailymail.records": "autotune.data.cnn_dailymail.records",
    "autotune.models.build_shape": "autotune.data.models.build_shape",
    "autotune.models.convert_smollm2": "autotune.data.models.convert_smollm2",
    "autotune.sharegpt.records": "autotune.data.sharegpt.records",
    "autotune.sweep.launchers.Cluster": "autotune.sweep.cluster.Cluster",
    "autotune.sweep.pruners.BehindBest": "autotune.search.pruners.BehindBest",
    "autotune.synthetic.news": "autotune.data.synthetic.news",
}


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A trial's config.yaml as this version would have written it."""
    moved: dict[str, Any] = _moved(config)
    for backend in (moved.get("backend"), (moved.get("prior") or {}).get("backend")):
        if isinstance(backend, dict):
            backend.pop("gpus", None)  # now only the trial's own `gpus` counts
    if isinstance(model := moved.get("model"), dict):
        model.pop("limits", None)  # now the benchmark's; the scenario has those that hold
    return moved


def _moved(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: MOVED.get(value, value) if key == "_target_" and isinstance(value, str) else _moved(value)
            for key, value in node.items()
        }
    return [_moved(item) for item in node] if isinstance(node, list) else node
