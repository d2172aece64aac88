"""The commands of `alignctl`, one module each where there is more to say than a call."""
