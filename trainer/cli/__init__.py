"""The trainer's commands, one module each. Torch is imported only while one of them runs."""
