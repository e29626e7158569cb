"""The Python API: on networks and data that are in memory, without a recipe or a file.

import npprune
found = npprune.discover(model, loader, topk=5)
pruned = npprune.prune(model, loader, target_macs=0.5, paths=found)
npprune.evaluate(pruned, loader)
npprune.heal(pruned, loader, epochs=7)
npprune.export(pruned, "model.onnx", loader)
npprune.save(pruned, "ckpt/model")
"""

from npprune.api.line import discover, evaluate, export, heal, prune
from npprune.api.networks import apply_plan, load, load_model, save
from npprune.api.paths import discover_paths
from npprune.api.reports import analyze, explore, report, study
from npprune.api.results import Cost, Found, Pruned
from npprune.core.attribution.search import PathBatch
from npprune.pipeline.common.events import Event
from npprune.records import Plan

__all__ = [
    "Cost",
    "Event",
    "Found",
    "PathBatch",
    "Plan",
    "Pruned",
    "analyze",
    "apply_plan",
    "discover",
    "discover_paths",
    "evaluate",
    "explore",
    "export",
    "heal",
    "load",
    "load_model",
    "prune",
    "report",
    "save",
    "study",
]
