"""Ways to train an adapter, one small module each over TRL and PEFT."""
