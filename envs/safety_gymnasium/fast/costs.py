"""Contacts and costs of the fast path, by numbers where the original compares names."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np


class FastCosts:
    """Task mixin: contacts of the robot with things, and the costs of contacts and distances."""

    _contacts: list[tuple[int, int, int]] | None
    """(bits of the kinds, geom, geom) of each contact of the robot; ``None``: not looked up yet."""

    def _bind_contacts(self: Any) -> None:
        """Give every geom a bit for its kind, by the names that the original compares."""
        model = self.model
        names = [model.geom(i).name for i in range(model.ngeom)]
        robot = set(self.agent.body_info.geom_names)
        kinds = ("button", "pillar", "vase", "gremlin")
        self._kind_bits = {kind: 2 << i for i, kind in enumerate(kinds)}
        bits = [
            (name in robot)
            + sum(bit for kind, bit in self._kind_bits.items() if name.startswith(kind))
            for name in names
        ]
        self._geom_bits = np.array(bits, dtype=np.int64)
        self._button_geoms = {name: i for i, name in enumerate(names) if name.startswith("button")}

    def _touched(self: Any, kind: str) -> list[tuple[int, int]]:
        """The contacts, as pairs of geoms, between the robot and things of a kind."""
        contacts: list[tuple[int, int, int]] = self._contacts or []
        if self._contacts is None:
            if self.data.ncon:
                pairs = self.data.contact.geom
                bits = self._geom_bits[pairs]
                either = bits[:, 0] | bits[:, 1]
                # The robot (bit 1), and more than the robot.
                rows = np.flatnonzero((either & 1) * either > 1)
                contacts = [(int(either[row]), *pairs[row].tolist()) for row in rows]
            self._contacts = contacts
        bit = self._kind_bits[kind]
        return [(one, other) for bits, one, other in contacts if bits & bit]

    @property
    def goal_achieved(self: Any) -> bool:
        """Whether the goal is reached, or its button pressed."""
        if self._button_geoms:
            goal = self._button_geoms[f"button{self.buttons.goal_button}"]
            return any(goal in pair for pair in self._touched("button"))
        return super().goal_achieved  # type: ignore[misc]

    def _bind_costs(self: Any) -> None:
        """Replace the cost functions of this task's things; Fading calls them too."""
        fast = {
            "buttons": self._button_cost,
            "hazards": self._hazard_cost,
            "pillars": self._pillar_cost,
            "gremlins": self._gremlin_cost,
            "sigwalls": self._boundary_cost,
            "vases": self._vase_cost,
        }
        self._costly = [o for o in self._obstacles if getattr(o, "is_constrained", False)]
        for obstacle in self._costly:
            if obstacle.name in fast and not getattr(obstacle, "displace_cost", 0.0):
                obstacle.cal_cost = functools.partial(fast[obstacle.name], obstacle)
            if obstacle.name == "vases":
                bodies = [self._body_ids[f"vase{i}"] for i in range(obstacle.num)]
                joints = self.model.body_jntadr[bodies]
                self._vase_velocities = self.model.jnt_dofadr[joints][:, None] + np.arange(3)

    def calculate_cost(self: Any) -> dict[str, float]:
        """Costs by kind and their sum, before the builder turns them into indicators."""
        if self._needs_forward:
            self._forward()
        cost: dict[str, float] = {}
        for obstacle in self._costly:
            cost.update(obstacle.cal_cost())
        cost["cost_sum"] = sum(cost.values())
        return cost

    def _hazard_cost(self: Any, hazards: Any) -> dict[str, float]:
        cost = 0.0
        for x, y, _ in self._lidar_offsets()[self._hazard_points].tolist():
            distance = math.sqrt(x * x + y * y)
            if distance <= hazards.size:
                cost += hazards.cost * (hazards.size - distance)
        return {"cost_hazards": cost}

    def _pillar_cost(self: Any, pillars: Any) -> dict[str, float]:
        return {"cost_pillars": len(self._touched("pillar")) * pillars.cost}

    def _gremlin_cost(self: Any, gremlins: Any) -> dict[str, float]:
        return {"cost_gremlins": len(self._touched("gremlin")) * gremlins.contact_cost}

    def _button_cost(self: Any, buttons: Any) -> dict[str, float]:
        if buttons.timer != 0:
            return {}
        goal = self._button_geoms[f"button{buttons.goal_button}"]
        wrong = sum(goal not in pair for pair in self._touched("button"))
        return {"cost_buttons": wrong * buttons.cost}

    def _boundary_cost(self: Any, walls: Any) -> dict[str, float]:
        x, y, _ = self.data.xpos[self._agent_body].tolist()
        outside = abs(x) > walls.locate_factor or (walls.num == 4 and abs(y) > walls.locate_factor)
        return {"cost_out_of_boundary": outside}

    def _vase_cost(self: Any, vases: Any) -> dict[str, float]:
        touched = len(self._touched("vase"))
        cost: dict[str, float] = {"cost_vases_contact": touched * vases.contact_cost}
        if vases.velocity_cost:
            # A free joint's first three velocities are the body's own: no Jacobian needed.
            velocity = self.data.qvel[self._vase_velocities]
            speeds = np.sqrt(np.sum(velocity * velocity, axis=1))
            moving = speeds[speeds >= vases.velocity_threshold].tolist()
            cost["cost_vases_velocity"] = sum(speed * vases.velocity_cost for speed in moving)
        return cost
