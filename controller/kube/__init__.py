"""The only part of the controller that talks to the API server."""
