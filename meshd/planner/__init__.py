"""The planner: pure functions from a question (`PlanInput`) to stages with predictions and reasons."""
