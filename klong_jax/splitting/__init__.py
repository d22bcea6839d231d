"""The context policy, and the splitter that replays it over a recorded demonstration."""
