"""Ways of adapting a model: examples -> batch, batch -> loss, model -> prediction."""
