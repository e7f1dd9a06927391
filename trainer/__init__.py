"""Makes and judges adapters. Imports adapters; talks to a served model over HTTP when it evaluates."""
