"""Kernels as nvrtc compiles them, on the CPU: from PTX to C++ for shim.h, a statement an instruction.

What is emulated from the source runs other text than a device where kernels have inline assembly or ask for the
architecture. What is emulated from PTX is what the device's own compiler made of it: chosen instructions, contracted
products, unrolled loops, inline assembly. ptx.h has the instructions by the PTX manual; checker.cpp watches memory.

An instruction that is not known here is an error: nothing is passed over.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

import nvrtc_binding
from ggufkit_kernels.cuda import loader
from ggufkit_kernels.cuda.loader import Module

GAP = 128  # bytes between shared variables, so that what is beyond one is not another
TYPES = {f"{kind}{bits}": f"{'int' if kind == 's' else 'uint'}{bits}_t" for kind in "sub" for bits in (8, 16, 32, 64)}
TYPES |= {"f32": "float", "pred": "bool"}
SPECIAL = {
    f"%{name}.{axis}": f"{value}.{axis}"
    for name, value in (("tid", "threadIdx"), ("ntid", "blockDim"), ("ctaid", "blockIdx"), ("nctaid", "gridDim"))
    for axis in "xyz"
}
_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{(.*?)\n\}", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
_LOCAL = re.compile(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]")
_REG = re.compile(r"\.reg\s+\.(\w+)\s+([%\w$]+)(?:<(\d+)>)?")
_ADDRESS = re.compile(r"\[([%\w$]+)(?:\+(-?\d+))?\]")
_PARAMETERS = r'extern "C" __global__ void\s+%s\s*\(([^)]*)\)'
_COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
_INT = r"[su](?:16|32|64)"
_BITS = r"b(?:16|32|64)"
# Instructions whose operands all have the type that is named last: {0}, {1} … are they, {T} is that type in C++.
FORMS = [
    (re.compile(pattern), form)
    for pattern, form in (
        (r"add(?:\.rn)?\.f32", "{0} + {1}"),
        (r"sub(?:\.rn)?\.f32", "{0} - {1}"),
        (r"mul(?:\.rn)?\.f32", "{0} * {1}"),
        (r"div\.rn\.f32", "{0} / {1}"),
        (r"fma\.rn\.f32", "fmaf({0}, {1}, {2})"),
        (r"fma\.rm\.f32", "ptx::fma_down({0}, {1}, {2})"),
        (r"max\.f32", "ptx::maximum({0}, {1})"),
        (r"min\.f32", "ptx::minimum({0}, {1})"),
        (r"abs\.f32", "fabsf({0})"),
        (r"neg\.f32", "-{0}"),
        (r"neg\.s32", "ptx::wrap_sub<{T}>(0, {0})"),
        (r"copysign\.f32", "ptx::copy_sign({0}, {1})"),
        (r"sqrt\.rn\.f32", "sqrtf({0})"),
        (r"rcp\.rn\.f32", "1.0f / {0}"),
        (r"ex2\.approx\.f32", "exp2f({0})"),
        (r"ex2\.approx\.ftz\.f32", "exp2_fast({0})"),
        (rf"add\.{_INT}", "ptx::wrap_add<{T}>({0}, {1})"),
        (rf"sub\.{_INT}", "ptx::wrap_sub<{T}>({0}, {1})"),
        (rf"mul\.lo\.{_INT}", "ptx::wrap_mul<{T}>({0}, {1})"),
        (r"mul\.hi\.(?:[su]32|u16)", "ptx::multiply_high<{T}>({0}, {1})"),
        (rf"mad\.lo\.{_INT}", "ptx::wrap_add<{T}>(ptx::wrap_mul<{T}>({0}, {1}), {2})"),
        (rf"div\.{_INT}", "ptx::divide<{T}>({0}, {1}, {line})"),
        (rf"rem\.{_INT}", "ptx::remainder<{T}>({0}, {1}, {line})"),
        (rf"max\.{_INT}", "ptx::larger<{T}>({0}, {1})"),
        (rf"min\.{_INT}", "ptx::smaller<{T}>({0}, {1})"),
        (r"dp4a\.s32\.s32", "__dp4a({0}, {1}, {2})"),
        (rf"and\.(?:pred|{_BITS})", "{0} & {1}"),
        (rf"or\.(?:pred|{_BITS})", "{0} | {1}"),
        (rf"xor\.(?:pred|{_BITS})", "{0} ^ {1}"),
        (r"not\.pred", "!{0}"),
        (rf"not\.{_BITS}", "~{0}"),
        (r"shf\.l\.wrap\.b32", "__funnelshift_l({0}, {1}, {2})"),
        (r"shf\.r\.wrap\.b32", "__funnelshift_r({0}, {1}, {2})"),
        (r"prmt\.b32", "ptx::permute({0}, {1}, {2})"),
        (r"popc\.b32", "__popc({0})"),
        (r"clz\.b32", "__clz((int){0})"),
        (r"brev\.b32", "__brev({0})"),
    )
]
CONVERSIONS = {  # the type that is converted, and how; between integers: `do_cvt`
    "f32.f16": ("u16", "half_to_float({0})"),
    "rn.f16.f32": ("f32", "float_to_half({0})"),
    "rn.f32.s32": ("s32", "(float){0}"),
    "rn.f32.u32": ("u32", "(float){0}"),
    "rni.s32.f32": ("f32", "__float2int_rn({0})"),
    "rzi.s32.f32": ("f32", "__float2int_rz({0})"),
    "rzi.f32.f32": ("f32", "truncf({0})"),
    "sat.f32.f32": ("f32", "ptx::saturate({0})"),
}


class UnknownInstruction(Exception):
    pass


def compiled(module: Module, arch: int) -> str:
    """The PTX of a module for a compute capability."""
    program = nvrtc_binding.createProgram(loader.source(module), module.file, (), ())
    nvrtc_binding.compileProgram(program, (*loader.options(module), "-lineinfo", f"-arch=compute_{arch}"))
    text = nvrtc_binding.getPTX(program).rstrip(b"\0").decode()
    nvrtc_binding.destroyProgram(program)
    return text


def place(module: Module, arch: int, line: int) -> str:
    """The line of the source, headers pasted in, that a line of the PTX comes from: its number and text."""
    text = "\n".join(compiled(module, arch).splitlines()[:line])
    found = re.findall(r"^\s*\.loc\s+\d+\s+([1-9]\d*)", text, re.MULTILINE)
    number = int(found[-1]) if found else 0
    return f"{number}: {loader.source(module).splitlines()[number - 1].strip()}"


@dataclass
class Layout:
    """Where variables lie in shared memory."""

    at: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: offset, bytes
    end: int = 0

    def add(self, text: str) -> list[str]:
        """The variables that a piece of PTX declares; their names."""
        names = []
        for align, kind, name, count in _SHARED.findall(text):
            nbytes = int(re.sub(r"\D", "", kind)) // 8 * int(count or 1)
            start = -(-self.end // max(int(align), 16)) * max(int(align), 16)
            self.at[name], self.end = (start, nbytes), start + nbytes + GAP
            names.append(name)
        return names


def translated(ptx: str, source: str) -> str:
    """C++ of all kernels in a PTX text, whose parameters are declared in their CUDA C++ `source`."""
    command = ["g++", "-E", "-P", "-DEMULATED", "-D__launch_bounds__(...)=", "-x", "c++", "-"]
    source = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    layout = Layout()
    ptx = re.sub(r"//[^\n]*|^\s*?\.loc\s[^\n]*", "", ptx, flags=re.MULTILINE)
    common = layout.add(_ENTRY.sub("", ptx))
    kernels = []
    for match in _ENTRY.finditer(ptx):
        name, body = match[1], match[4]
        declared = re.search(_PARAMETERS % name, source)
        assert declared is not None, name
        names = [part.split()[-1].strip("*&") for part in declared[1].split(",")]
        own = layout.add(body)
        variables = {key: layout.at[key] for key in (*common, *own)}
        line = ptx.count("\n", 0, match.start(4)) + 1
        kernels.append(f"void {name}({declared[1]}) {{\n" + Body(name, names, variables).text(body, line) + "}\n")
    typedefs = re.findall(r"^typedef [\w ]+;$", source, re.MULTILINE)
    return "\n".join([
        "#define SHIM_CHECKED", '#include "shim.h"', '#include "ptx.h"', "namespace ptx {",
        f'__attribute__((section("shared_memory"), aligned(128))) unsigned char shared_room[{layout.end + 16}];',
        "}", "namespace {", *typedefs, "using ptx::as; using ptx::set;", *kernels, "}",
    ])  # fmt: skip


class Body:
    """One kernel's instructions."""

    def __init__(self, name: str, parameters: list[str], variables: dict[str, tuple[int, int]]):
        self.parameters = {f"{name}_param_{k}": parameter for k, parameter in enumerate(parameters)}
        self.variables, self.local, self.line = variables, "", 0

    def text(self, body: str, line: int) -> str:
        """The whole function's body. `line`: of the PTX, where it begins."""
        head = ["const ptx::Variable variables[] = {"]
        head += [f"    {{{at}, {nbytes}}}," for at, nbytes in self.variables.values()] or ["    {0, 0},"]
        head += ["};", "(void)variables;", f"alignas(8) unsigned char parameter_room[{8 * len(self.parameters)}];"]
        for place, name in enumerate(self.parameters.values()):
            head.append(f"memcpy(parameter_room + {8 * place}, &{name}, sizeof {name});")
        out: list[str] = []
        for self.line, statement in _statements(body, line):
            self.declare(statement, head) or out.extend(self.statement(statement))
        return "\n".join([*head, *out, ""])

    def declare(self, statement: str, head: list[str]) -> bool:
        if match := _LOCAL.fullmatch(statement):
            self.local = match[2]
            head.append(f"alignas({match[1]}) unsigned char local_room[{match[3]}];")
        elif (match := _REG.fullmatch(statement)) and match[3]:
            names = ", ".join(f"{_register(match[2])}{k}" for k in range(int(match[3])))
            head.append(f"{TYPES[match[1]]} {names};")
        elif match and match[2].startswith("%SP"):
            head.append(f"{TYPES[match[1]]} {_register(match[2])};")
        else:
            return bool(_SHARED.fullmatch(statement)) or statement.startswith(".pragma")
        return True

    def statement(self, statement: str) -> list[str]:
        """C++ of one statement, which may be a label or a brace."""
        if statement in ("{", "}"):
            return [statement]
        if statement.endswith(":"):
            return [f"{_register(statement[:-1])}:;"]
        if match := _REG.fullmatch(statement):  # in a scope of its own
            return [f"{TYPES[match[1]]} {_register(match[2])};"]
        guard = ""
        if match := re.match(r"@(!?)(%\w+)\s+", statement):
            guard, statement = f"if ({match[1]}{_register(match[2])}) ", statement[match.end() :]
        opcode, _, rest = statement.partition(" ") if " " in statement else statement.partition("\t")
        opcode = opcode.strip()
        try:
            code = self.instruction(opcode, _operands(rest))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise UnknownInstruction(f"line {self.line}: {statement}") from error
        return [f"{guard}{{ {code} }}  // {self.line}: {statement}"]

    def instruction(self, opcode: str, operands: list[str]) -> str:
        for pattern, form in FORMS:
            if pattern.fullmatch(opcode):
                kind = opcode.rpartition(".")[2]
                given = [self.value(operand, kind) for operand in operands[1:]]
                code = form.format(*given, T=TYPES[kind], line=self.line)
                return self.put(operands[0], f"({TYPES[kind]})({code})")
        name, *parts = opcode.replace("::", "_").split(".")
        return getattr(self, f"do_{name}")(parts, operands)

    # -- operands ------------------------------------------------------------------------------------------

    def value(self, operand: str, kind: str) -> str:
        """An operand as a value of a PTX type."""
        return f"as<{TYPES[kind]}>({self.raw(operand)})"

    def raw(self, operand: str) -> str:
        if operand in SPECIAL:
            return f"(uint32_t){SPECIAL[operand]}"
        if operand in self.variables:
            return f"(uint32_t){self.variables[operand][0]}"
        if operand in self.parameters:
            return f"(uint64_t)(parameter_room + {8 * list(self.parameters).index(operand)})"
        if operand == self.local:
            return "(uint64_t)local_room"
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
            return f"(uint32_t)0x{operand[2:]}u"
        if re.fullmatch(r"0x[0-9A-Fa-f]+U", operand):
            return operand
        if re.fullmatch(r"-?\d+", operand):
            return f"(int64_t){operand}ll"
        if re.fullmatch(r"%[A-Za-z]+\d*|[a-z]", operand):
            return _register(operand)
        raise ValueError(operand)

    def address(self, operand: str, bits: int) -> str:
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise ValueError(operand)
        return f"as<uint{bits}_t>({self.raw(match[1])}) + ({match[2] or 0})"

    def put(self, operand: str, value: str) -> str:
        return "" if operand == "_" else f"set({_register(operand)}, {value});"

    # -- moves and control ---------------------------------------------------------------------------------

    def do_mov(self, parts: list[str], o: list[str]) -> str:
        (kind,) = parts
        if o[1].startswith("{"):  # halves of a word, the lower first
            low, high = (self.value(name, f"u{int(kind[1:]) // 2}") for name in _vector(o[1]))
            return self.put(o[0], f"(({TYPES[kind]}){high} << {int(kind[1:]) // 2} | {low})")
        if o[0].startswith("{"):
            bits = int(kind[1:]) // 2
            parts = [f"(uint{bits}_t)({self.value(o[1], kind)} >> {k * bits})" for k in (0, 1)]
            return " ".join(self.put(name, part) for name, part in zip(_vector(o[0]), parts, strict=True))
        return self.put(o[0], self.value(o[1], kind))

    def do_bra(self, parts: list[str], o: list[str]) -> str:
        if parts not in ([], ["uni"]):
            raise ValueError(parts)
        return f"goto {_register(o[0])};"

    def do_ret(self, parts: list[str], o: list[str]) -> str:
        return "return;"

    def do_trap(self, parts: list[str], o: list[str]) -> str:
        return f'shim::fail("__trap", {self.line});'

    def do_selp(self, parts: list[str], o: list[str]) -> str:
        (kind,) = parts
        return self.put(o[0], f"{_register(o[3])} ? {self.value(o[1], kind)} : {self.value(o[2], kind)}")

    def do_setp(self, parts: list[str], o: list[str]) -> str:
        compare, kind = parts
        a, b = self.value(o[1], kind), self.value(o[2], kind)
        if kind == "f32" and compare == "nan":
            form = f"{a} != {a} || {b} != {b}"
        elif kind == "f32" and compare.endswith("u"):  # true as well where one is no number
            form = f"{a} != {a} || {b} != {b} || {a} {_COMPARE[compare[:-1]]} {b}"
        elif kind == "f32" and compare == "ne":  # false where one is no number
            form = f"{a} < {b} || {a} > {b}"
        else:
            form = f"{a} {_COMPARE[compare]} {b}"
        return self.put(o[0], form)

    # -- numbers -------------------------------------------------------------------------------------------

    def do_mul(self, parts: list[str], o: list[str]) -> str:
        wide, kind = parts
        if wide != "wide":
            raise ValueError(parts)
        to = TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
        a, b = (f"({to}){self.value(operand, kind)}" for operand in o[1:])
        return self.put(o[0], f"({to})({a} * {b})")

    def shift(self, parts: list[str], o: list[str], name: str) -> str:
        (kind,) = parts
        value, by = self.value(o[1], kind), self.value(o[2], "u32")
        return self.put(o[0], f"ptx::{name}<{TYPES[kind]}>({value}, {by})")

    def do_shl(self, parts: list[str], o: list[str]) -> str:
        return self.shift(parts, o, "shift_left")

    def do_shr(self, parts: list[str], o: list[str]) -> str:
        return self.shift(parts, o, "shift_right")

    def do_bfi(self, parts: list[str], o: list[str]) -> str:
        (kind,) = parts
        field, into = self.value(o[1], kind), self.value(o[2], kind)
        at, bits = self.value(o[3], "u32"), self.value(o[4], "u32")
        return self.put(o[0], f"ptx::insert_bits<{TYPES[kind]}>({field}, {into}, {at}, {bits})")

    def do_cvt(self, parts: list[str], o: list[str]) -> str:
        form = ".".join(parts)
        if form == "rn.f16x2.f32":  # the first operand becomes the upper half
            return self.put(o[0], f"pack_halves({self.value(o[2], 'f32')}, {self.value(o[1], 'f32')})")
        if form in CONVERSIONS:
            kind, code = CONVERSIONS[form]
            return self.put(o[0], code.format(self.value(o[1], kind)))
        to, of = parts
        if "f" in to + of:
            raise ValueError(parts)
        return self.put(o[0], f"({TYPES[to]}){self.value(o[1], of)}")

    def do_cvta(self, parts: list[str], o: list[str]) -> str:
        value = self.value(o[1], "u64")
        forms = {
            "to.global.u64": value, "global.u64": value, "to.local.u64": value, "local.u64": value,
            "shared.u64": f"{value} + (uint64_t)ptx::shared_room",
            "to.shared.u64": f"{value} - (uint64_t)ptx::shared_room",
        }  # fmt: skip
        return self.put(o[0], forms[".".join(parts)])

    # -- memory --------------------------------------------------------------------------------------------

    def split(self, parts: list[str]) -> tuple[str, str, int, set[str]]:
        """Of a load or store: the space, the type, how many of them, and what else is said."""
        space, kind = parts[0], parts[-1]
        if space == "volatile":
            space, parts = parts[1], ["volatile", *parts]
        count = {"v2": 2, "v4": 4}.get(parts[-2], 1)
        more = set(parts[1:-1]) - {"v2", "v4", space}
        known = {"nc", "L1_no_allocate", "L2_128B", "cg", "volatile"}
        if more - known:
            raise ValueError(parts)
        return space, kind, count, more

    def do_ld(self, parts: list[str], o: list[str]) -> str:
        space, kind, count, more = self.split(parts)
        if space == "param":
            room = f"parameter_room, sizeof parameter_room, {self.address(o[1], 64)}, {self.line}"
            return self.put(o[0], f"ptx::load_local<{TYPES[kind]}, 1>({room}).v[0]")
        kinds = f"<{TYPES[kind]}, {count}>"
        if space == "global":
            how = "ptx::CONSTANT" if "nc" in more else "ptx::READ"
            load = f"ptx::load_global{kinds}({self.address(o[1], 64)}, {how}, {self.line})"
        elif space == "shared":
            load = f"ptx::load_shared{kinds}(variables, {self.address(o[1], 32)}, {self.line})"
        elif space == "local":
            load = f"ptx::load_local{kinds}(local_room, sizeof local_room, {self.address(o[1], 64)}, {self.line})"
        else:
            raise ValueError(parts)
        names = _vector(o[0])
        assert len(names) == count, o
        return f"const auto t = {load}; " + " ".join(self.put(name, f"t.v[{k}]") for k, name in enumerate(names))

    def do_st(self, parts: list[str], o: list[str]) -> str:
        space, kind, count, _ = self.split(parts)
        names = _vector(o[1])
        assert len(names) == count, o
        values = ", ".join(self.value(name, kind) for name in names)
        made = f"const ptx::Several<{TYPES[kind]}, {count}> t = {{{{{values}}}}};"
        if space == "global":
            return f"{made} ptx::store_global({self.address(o[0], 64)}, t, {self.line});"
        if space == "shared":
            return f"{made} ptx::store_shared(variables, {self.address(o[0], 32)}, t, {self.line});"
        if space == "local":
            return f"{made} ptx::store_local(local_room, sizeof local_room, {self.address(o[0], 64)}, t, {self.line});"
        raise ValueError(parts)

    def do_atom(self, parts: list[str], o: list[str]) -> str:
        if parts[:2] == ["relaxed", "gpu"]:  # as it is without
            parts = parts[2:]
        space, change, kind = parts
        if space != "global" or change not in ("add", "max", "inc"):
            raise ValueError(parts)
        value = f"{self.value(o[2], kind)}, {self.line}"
        kinds = TYPES[kind]
        return self.put(o[0], f"ptx::atomic<{kinds}>({self.address(o[1], 64)}, ptx::change_{change}<{kinds}>, {value})")

    def do_membar(self, parts: list[str], o: list[str]) -> str:
        if parts != ["gl"]:
            raise ValueError(parts)
        return "ptx::fence();"

    def do_griddepcontrol(self, parts: list[str], o: list[str]) -> str:
        return {"wait": "ptx::wait_for_grids();", "launch_dependents": ""}[parts[0]]

    def do_prefetch(self, parts: list[str], o: list[str]) -> str:
        return f"ptx::prefetch({self.address(o[0], 64)}, {self.line});"

    def do_cp(self, parts: list[str], o: list[str]) -> str:
        if parts == ["async", "cg", "shared", "global"]:
            to, of = self.address(o[0], 32), self.address(o[1], 64)
            if o[2] != "16":
                raise ValueError(o)
            return f"ptx::begin_copy(variables, {to}, {of}, {self.value(o[3], 'u32')}, {self.line});"
        if parts == ["async", "commit_group"]:
            return "copies_commit();"
        if parts == ["async", "wait_group"]:
            return f"ptx::wait_copies<{int(o[0])}>({self.line});"
        raise ValueError(parts)

    # -- warps and blocks ----------------------------------------------------------------------------------

    def do_bar(self, parts: list[str], o: list[str]) -> str:
        if parts == ["sync"] and o == ["0"]:
            return f"ptx::barrier({self.line});"
        if parts == ["red", "popc", "u32"] and o[1] == "0":
            return self.put(o[0], f"ptx::barrier_count({self.value(o[2], 'pred')})")
        if parts == ["warp", "sync"]:
            return f"ptx::barrier_warp({self.value(o[0], 'u32')}, {self.line});"
        raise ValueError(parts)

    def do_shfl(self, parts: list[str], o: list[str]) -> str:
        sync, how, kind = parts
        if (sync, kind) != ("sync", "b32"):
            raise ValueError(parts)
        # whether the lane was inside of its segment: asked for in PTX, and used by nothing so far
        to = o[0].split("|")[0]
        given = ", ".join(self.value(operand, "u32") for operand in o[1:5])
        return self.put(to, f"ptx::shuffle(ptx::{how.upper()}, {given}, {self.line})")

    def do_vote(self, parts: list[str], o: list[str]) -> str:
        _sync, how, _kind = parts
        mask = self.value(o[2], "u32")
        ballot = f"ptx::ballot({self.value(o[1], 'pred')}, {mask}, {self.line})"
        return self.put(o[0], {"ballot": ballot, "any": f"{ballot} != 0", "all": f"{ballot} == {mask}"}[how])

    def do_ldmatrix(self, parts: list[str], o: list[str]) -> str:
        trans = "trans" in parts
        if [part for part in parts if part != "trans"] != ["sync", "aligned", "m8n8", "x4", "shared", "b16"]:
            raise ValueError(parts)
        code = f"uint32_t t[4]; ptx::load_matrices(variables, t, {self.address(o[1], 32)}, {int(trans)}, {self.line}); "
        return code + " ".join(self.put(name, f"t[{k}]") for k, name in enumerate(_vector(o[0])))

    def do_mma(self, parts: list[str], o: list[str]) -> str:
        eights = {"m16n8k8": 1, "m16n8k16": 2}[parts[2]]
        if parts[:2] + parts[3:] != ["sync", "aligned", "row", "col", "f32", "f16", "f16", "f32"]:
            raise ValueError(parts)
        d, a, b, c = (_vector(operand) for operand in o)
        assert (len(d), len(a), len(b), len(c)) == (4, 2 * eights, eights, 4), o
        values = [
            ", ".join(self.value(name, kind) for name in names) for names, kind in ((c, "f32"), (a, "u32"), (b, "u32"))
        ]
        code = f"float t[4] = {{{values[0]}}}; const uint32_t a[] = {{{values[1]}}}, b[] = {{{values[2]}}}; "
        code += f'shim::multiply(t, a, b, {eights}, "{parts[2]}", {self.line}); '
        return code + " ".join(self.put(name, f"t[{k}]") for k, name in enumerate(d))


def _statements(body: str, line: int) -> Iterator[tuple[int, str]]:
    """The statements of a body with their lines: labels, braces of scopes, declarations, instructions."""
    at = 0
    for match in re.finditer(r"\s*(?:([$\w]+:)|(\{)(?=\s*\.reg)|(\})|([^;]+);)", body):
        assert match.start() == at, body[at : at + 80]
        at = match.end()
        found = next(group for group in match.groups() if group is not None)
        start = match.end() - len(found) - (match[4] is not None)
        yield line + body.count("\n", 0, start), re.sub(r"\s+", " ", found.strip())
    assert not body[at:].strip(), body[at : at + 80]


def _operands(text: str) -> list[str]:
    """Operands, apart by commas that are in no braces."""
    return [re.sub(r"\s", "", part) for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text) if part.strip()]


def _vector(operand: str) -> list[str]:
    return operand[1:-1].split(",") if operand.startswith("{") else [operand]


def _register(name: str) -> str:
    return "v_" + name.lstrip("%").replace("$", "_")
