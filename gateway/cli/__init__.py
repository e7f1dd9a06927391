"""The gateway's commands: `running` starts and stops it, `access` manages tenants and keys, `adapters` what they serve."""
