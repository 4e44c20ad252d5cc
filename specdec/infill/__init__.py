"""Any-subset infilling: masks in text, and the loop in rank order."""
