"""From logits to tokens: sampling parameters, the candidates for a token, and the pick."""
