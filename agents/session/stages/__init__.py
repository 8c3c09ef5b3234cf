"""What the coordinator sends to the stages of its answers, what it receives from them, and how it notices that one is stuck."""
