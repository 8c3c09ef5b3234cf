"""The planner: pure. A question (`PlanInput`) goes in, stages with predictions and reasons come out."""
