"""From a model's raw text to what a chat answer is made of: reasoning, content and tool calls, piece by piece."""
