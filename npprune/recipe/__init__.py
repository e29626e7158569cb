"""A recipe: what was asked for, one section a stage. Reads YAML; knows no torch and no timm.

Unknown keys are refused with the nearest right name, duplicate keys are an error, `1e-3` is a
number, and every message carries file:line.
"""

from npprune.recipe.loading import (
    load_recipe,
    read_recipe,
    recipe_yaml,
    section_of,
    shipped_recipes,
)
from npprune.recipe.rules import check
from npprune.recipe.sections import (
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
    "check",
    "load_recipe",
    "read_recipe",
    "recipe_yaml",
    "section_of",
    "shipped_recipes",
]
