"""Choose which peers compute which layers: pure functions from a `PlanInput` to stages, predictions and reasons."""
