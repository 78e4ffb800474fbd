"""What would happen if: answers, bounds, reasons, prices and hindsight about fleets and loads."""
