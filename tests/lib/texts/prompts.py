"""Beginnings of texts, from 3 to 14 tokens long, for tests that compare answers."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "¿Cuál es la capital de España?",
    "List three primary colours:\n1.",
    "Q: Who wrote Hamlet?\nA:",
    "The mitochondria is the",
    "import numpy as np\n\n",
    "In 1969, Neil Armstrong",
    "Roses are red,",
    "日本の首都は",
    "A recipe for pancakes: first,",
    "The difference between TCP and UDP is that",
    "SELECT name FROM users WHERE",
    "My favourite season is autumn, because",
    "To be, or not to be,",
)
SENTENCE = "The history of the lighthouse, told by those who kept it. "
"""13 tokens, to make a prompt longer."""
