"""A recipe: what was asked for, one section a stage. Reads YAML; knows no torch and no timm.

Unknown keys are refused with the nearest right name, duplicate keys are an error, `1e-3` is a
number, and every message carries file:line.
"""

from npprune.recipe.loading import load_recipe, recipe_yaml, shipped_recipes
from npprune.recipe.messages import bounds
from npprune.recipe.rules import check
from npprune.recipe.sections import (
    BUDGETS,
    DataSection,
    DiscoverSection,
    EvaluateSection,
    ExportSection,
    HealSection,
    ModelSection,
    PruneSection,
    Recipe,
    Section,
    StudySection,
)

__all__ = [
    "BUDGETS",
    "DataSection",
    "DiscoverSection",
    "EvaluateSection",
    "ExportSection",
    "HealSection",
    "ModelSection",
    "PruneSection",
    "Recipe",
    "Section",
    "StudySection",
    "bounds",
    "check",
    "load_recipe",
    "recipe_yaml",
    "shipped_recipes",
]
