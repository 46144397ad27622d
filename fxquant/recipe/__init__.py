"""What to quantize and how: recipes, their keys, selectors, and the named ones."""

from fxquant.recipe.methods import METHODS, learned_methods
from fxquant.recipe.names import GRAMMAR
from fxquant.recipe.override import Override
from fxquant.recipe.recipe import Recipe
from fxquant.recipe.reconstruction import ReconstructionRecipe
from fxquant.recipe.selector import Selector
from fxquant.recipe.tables import (
    ActivationRecipe,
    CalibrationRecipe,
    OperationRecipe,
    WeightRecipe,
)

__all__ = [
    "GRAMMAR",
    "METHODS",
    "ActivationRecipe",
    "CalibrationRecipe",
    "OperationRecipe",
    "Override",
    "Recipe",
    "ReconstructionRecipe",
    "Selector",
    "WeightRecipe",
    "learned_methods",
]
