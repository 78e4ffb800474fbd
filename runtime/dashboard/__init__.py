"""The live view: what the gateway tells a browser, and the one page that shows it."""
