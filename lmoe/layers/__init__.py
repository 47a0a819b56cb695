"""Modules: LoRALinear, MixtureLoRALinear, routers, RoutingTrace."""
