"""Callbacks that dtrain brings along; users name them as dtrain.WeightAveraging and so on."""
