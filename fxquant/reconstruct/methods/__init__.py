"""Methods of learned rounding, a file for each; `fxquant.recipe.METHODS` says where."""
