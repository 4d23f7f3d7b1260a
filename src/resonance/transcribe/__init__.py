"""From audio to text."""
