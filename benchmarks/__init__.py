"""What is measured, each beside what it is measured against: one command per table or picture."""
