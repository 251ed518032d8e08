package main

import (
	"bytes"
	"encoding/json"
	"math"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A value of canonical JSON in the log's profile: string, int64, bool, []value or object.
type value any

type member struct {
	name  string
	value value
}

// An object's members, in the order of their names, each once.
type object []member

func (o object) get(name string) value {
	i := sort.Search(len(o), func(i int) bool { return o[i].name >= name })
	if i < len(o) && o[i].name == name {
		return o[i].value
	}
	return nil
}

func (o object) text(name string) string {
	s, _ := o.get(name).(string)
	return s
}

func (o object) number(name string) int64 {
	n, _ := o.get(name).(int64)
	return n
}

const maxInt = 1<<53 - 1

// A reader takes exactly the canonical spelling of a value (RFC 8785 without floats and null, ASCII names) and no other.
type reader struct {
	data []byte
	at   int
}

func (r *reader) take(c byte) bool {
	if r.at < len(r.data) && r.data[r.at] == c {
		r.at++
		return true
	}
	return false
}

func (r *reader) word(w string) bool {
	if bytes.HasPrefix(r.data[r.at:], []byte(w)) {
		r.at += len(w)
		return true
	}
	return false
}

func (r *reader) value(depth int) (value, bool) {
	if r.at == len(r.data) {
		return nil, false
	}
	switch c := r.data[r.at]; {
	case c == '"':
		return r.text()
	case c == '{' && depth > 0:
		return r.object(depth - 1)
	case c == '[' && depth > 0:
		return r.array(depth - 1)
	case c == 't':
		return true, r.word("true")
	case c == 'f':
		return false, r.word("false")
	case c == '-' || c >= '0' && c <= '9':
		return r.integer()
	}
	return nil, false
}

func (r *reader) integer() (value, bool) {
	start := r.at
	for r.at < len(r.data) && (r.data[r.at] == '-' || r.data[r.at] >= '0' && r.data[r.at] <= '9') {
		r.at++
	}
	spelled := string(r.data[start:r.at])
	n, err := strconv.ParseInt(spelled, 10, 64)
	return n, err == nil && strconv.FormatInt(n, 10) == spelled && n <= maxInt && n >= -maxInt
}

func (r *reader) text() (string, bool) {
	r.at++
	end := r.at
	for end < len(r.data) && r.data[end] >= 0x20 && r.data[end] != '"' && r.data[end] != '\\' {
		end++
	}
	var found strings.Builder
	found.Write(r.data[r.at:end])
	r.at = end
	for r.at < len(r.data) {
		c := r.data[r.at]
		switch {
		case c == '"':
			r.at++
			return found.String(), true
		case c < 0x20:
			return "", false
		case c == '\\':
			plain, ok := r.escape()
			if !ok {
				return "", false
			}
			found.WriteByte(plain)
		default:
			found.WriteByte(c)
			r.at++
		}
	}
	return "", false
}

// escape takes the only escapes that are canonical: those of characters that must be escaped, each in its one form.
func (r *reader) escape() (byte, bool) {
	for _, e := range []struct {
		spelled string
		plain   byte
	}{{`\"`, '"'}, {`\\`, '\\'}, {`\b`, '\b'}, {`\f`, '\f'}, {`\n`, '\n'}, {`\r`, '\r'}, {`\t`, '\t'}} {
		if r.word(e.spelled) {
			return e.plain, true
		}
	}
	if r.at+6 > len(r.data) || !r.word(`\u00`) {
		return 0, false
	}
	spelled := string(r.data[r.at : r.at+2])
	n, err := strconv.ParseUint(spelled, 16, 8)
	r.at += 2
	short := n == '\b' || n == '\f' || n == '\n' || n == '\r' || n == '\t'
	return byte(n), err == nil && n < 0x20 && !short && strings.ToLower(spelled) == spelled
}

func (r *reader) array(depth int) (value, bool) {
	r.at++
	found := []value{}
	if r.take(']') {
		return found, true
	}
	for {
		v, ok := r.value(depth)
		if !ok {
			return nil, false
		}
		found = append(found, v)
		if r.take(']') {
			return found, true
		}
		if !r.take(',') {
			return nil, false
		}
	}
}

func (r *reader) object(depth int) (value, bool) {
	r.at++
	found := make(object, 0, 24)
	if r.take('}') {
		return found, true
	}
	for {
		if r.at == len(r.data) || r.data[r.at] != '"' {
			return nil, false
		}
		name, ok := r.text()
		if !ok || !isASCII(name) || len(found) > 0 && name <= found[len(found)-1].name || !r.take(':') {
			return nil, false
		}
		v, ok := r.value(depth)
		if !ok {
			return nil, false
		}
		found = append(found, member{name, v})
		if r.take('}') {
			return found, true
		}
		if !r.take(',') {
			return nil, false
		}
	}
}

func isASCII(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// canonical is the object that these bytes spell; else why they spell none: E_PARSE or E_CANON.
func canonical(data []byte) (object, string) {
	if !utf8.Valid(data) {
		return nil, "E_PARSE"
	}
	r := reader{data: data}
	v, ok := r.value(4)
	if found, is := v.(object); ok && is && r.at == len(data) {
		return found, ""
	}
	if json.Valid(data) {
		return nil, "E_CANON"
	}
	return nil, "E_PARSE"
}

// ---- the fields of a record ------------------------------------------------------------------------------------------

type check func(value) bool

// class is a set of bytes.
type class [256]bool

func of(spans ...string) class {
	var c class
	for _, s := range spans {
		for b := int(s[0]); b <= int(s[len(s)-1]); b++ {
			c[b] = true
		}
	}
	return c
}

func (c class) all(s string) bool {
	for i := 0; i < len(s); i++ {
		if !c[s[i]] {
			return false
		}
	}
	return true
}

var (
	lower    = of("a-z", "0-9")
	placeSet = of("a-z", "0-9", ".", "_", "-")
	wordSet  = of("A-Z", "a-z", "0-9", ".", "_", ":", "-")
	ruleSet  = of("A-Z", "a-z", "0-9", ".", "_", ":", "/", "@", "-")
	hexSet   = of("0-9", "a-f")
	addrSet  = of("0-9", "a-f", ".", ":")
	printSet = of(" -~")
	digitSet = of("0-9")
)

func text(c class, least, most int) check {
	return func(v value) bool {
		s, ok := v.(string)
		return ok && len(s) >= least && len(s) <= most && c.all(s)
	}
}

// led is text whose first character is a lower-case letter or digit.
func led(c class, most int) check {
	return func(v value) bool {
		s, ok := v.(string)
		return ok && s != "" && len(s) <= most && lower[s[0]] && c.all(s)
	}
}

func oneOf(words ...string) check {
	return func(v value) bool {
		for _, w := range words {
			if v == w {
				return true
			}
		}
		return false
	}
}

func uint53(v value) bool {
	n, ok := v.(int64)
	return ok && n >= 0
}

func boolean(v value) bool {
	_, ok := v.(bool)
	return ok
}

func uuid(v value) bool {
	s, ok := v.(string)
	if !ok || len(s) != 36 {
		return false
	}
	for i := 0; i < 36; i++ {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (s[i] == '-') || !dash && !hexSet[s[i]] {
			return false
		}
	}
	return true
}

func evenHex(v value) bool {
	s, ok := v.(string)
	return ok && len(s) >= 2 && len(s) <= 4096 && len(s)%2 == 0 && hexSet.all(s)
}

func list(each check, most int) check {
	return func(v value) bool {
		found, ok := v.([]value)
		if !ok || len(found) > most {
			return false
		}
		for _, item := range found {
			if !each(item) {
				return false
			}
		}
		return true
	}
}

func context(v value) bool {
	o, ok := v.(object)
	if !ok || len(o) > 128 {
		return false
	}
	for _, m := range o {
		s, _ := m.value.(string)
		generation, hash, found := strings.Cut(strings.TrimPrefix(s, "h"), ":")
		if !code(m.name) || !found || !strings.HasPrefix(s, "h") || len(generation) < 1 ||
			len(generation) > 9 || !digitSet.all(generation) || len(hash) != 32 || !hexSet.all(hash) {
			return false
		}
	}
	return true
}

func rootOfLog(v value) bool {
	pair, ok := v.([]value)
	return ok && len(pair) == 2 && uint53(pair[0]) && hex64(pair[1])
}

var (
	code    = text(wordSet, 1, 64)
	place   = led(placeSet, 63)
	hex32   = text(hexSet, 32, 32)
	hex64   = text(hexSet, 64, 64)
	address = text(addrSet, 2, 45)
	version = func(v value) bool { return v == int64(1) }
	logName = led(of("a-z", "0-9", ".", "_", "/", "-"), 128)
	opName  = led(of("a-z", "0-9", "_"), 64)
)

var base = map[string]check{"id": uuid, "kind": func(value) bool { return true }, "node": place, "ts": uint53, "v": version}

var asked = with(base, map[string]check{
	"actor": text(printSet, 1, 512), "alg": code, "appr": list(code, 16),
	"authn": oneOf("mtls", "oidc", "k8s", "token", "sigv4", "vault", "internal", "none"),
	"batch": uuid, "bi": uint53, "creg": place, "creq": text(wordSet, 1, 128), "ctx": context, "dry": boolean, "ev": hex64,
	"dest": list(place, 64), "exc": code, "facts": hex32, "frz": uint53, "grant": code, "hops": list(code, 16), "hsm": code, "in_len": uint53, "intent": uuid, "key": uuid, "kv": uint53,
	"kver": uint53, "op": func(v value) bool { s, ok := v.(string); return opName(v) && ok && (s[0] < '0' || s[0] > '9') },
	"orig": list(place, 64), "out": oneOf("ok", "denied", "failed", "error"), "out_len": uint53, "pol": hex32, "purpose": led(placeSet, 64), "reason": code, "region": place,
	"req": uuid, "rh": hex64, "rule": list(text(ruleSet, 1, 128), 8), "src": address, "tenant": led(placeSet, 64),
	"tier": uint53, "trace": hex32, "us": uint53, "via": list(place, 64), "why": code, "x": evenHex,
})

type kind struct {
	fields map[string]check
	needed []string
}

var kinds = map[string]kind{
	"op":       {asked, []string{"op", "out"}},
	"intent":   {asked, []string{"op"}},
	"outcome":  {asked, []string{"op", "out", "intent"}},
	"auth":     {asked, []string{"why"}},
	"admin":    {asked, []string{"op"}},
	"withheld": {asked, []string{"intent"}},
	"open": {with(base, map[string]check{"cert": evenHex, "cfg": hex64, "clk": code, "dist": hex64, "epoch": uint53,
		"pub": hex64, "ver": code}), []string{"cert", "cfg", "clk", "dist", "epoch", "pub", "ver"}},
	"close": {with(base, map[string]check{"count": uint53, "epoch": uint53}), []string{"count", "epoch"}},
	"mark":  {with(base, map[string]check{"root": rootOfLog}), nil},
	"suppressed": {with(base, map[string]check{"count": uint53, "from": uint53, "src": address, "to": uint53, "why": code}),
		[]string{"count", "from", "to", "why"}},
	"prune": {with(asked, map[string]check{"at": uint53, "from": uint53, "hash": hex64, "log": logName, "policy": code,
		"to": uint53}), []string{"at", "from", "hash", "log", "op", "out", "policy", "to"}},
	"clock": {with(base, map[string]check{"now": uint53, "was": uint53}), []string{"now", "was"}},
}

func with(a, b map[string]check) map[string]check {
	made := map[string]check{}
	for _, m := range []map[string]check{a, b} {
		for name, c := range m {
			made[name] = c
		}
	}
	return made
}

// parse is the record that these bytes spell, whether it is of a later version, or why it is none.
func parse(body []byte, schemas map[string]kind, always []string) (record object, later bool, code string) {
	record, code = canonical(body)
	if code != "" {
		return nil, false, code
	}
	schema, known := schemas[record.text("kind")]
	good := known
	for _, names := range [][]string{always, schema.needed} {
		for _, name := range names {
			good = good && record.get(name) != nil
		}
	}
	for _, m := range record {
		c, is := schema.fields[m.name]
		good = good && is && c(m.value)
	}
	if good {
		return record, false, ""
	}
	tenant := record.get("tenant")
	if _, is := tenant.(string); record.number("v") > 1 && (tenant == nil || is) {
		return record, true, ""
	}
	return nil, false, "E_SCHEMA"
}

var always = []string{"id", "kind", "node", "ts", "v"}

// ---- the frame around it -------------------------------------------------------------------------------------------------

type frame struct {
	log, previous string
	n, t          int64
	tenant        bool
	tn            int64
	tp            string
	body          []byte
}

// parseFrame takes an entry apart by its bytes, without a JSON parser.
func parseFrame(entry []byte) (frame, string) {
	f, ok := cutFrame(entry)
	if !ok {
		if bytes.HasPrefix(entry, []byte(`{"c":{`)) && bytes.HasSuffix(entry, []byte("}")) {
			return f, "E_SCHEMA"
		}
		return f, "E_PARSE"
	}
	if len(f.body) > 32768 {
		return f, "E_SCHEMA"
	}
	return f, ""
}

func cutFrame(entry []byte) (f frame, ok bool) {
	r := reader{data: entry}
	if !r.word(`{"c":{"l":`) {
		return f, false
	}
	if f.log, ok = r.quoted(isLog); !ok || !r.word(`,"n":`) {
		return f, false
	}
	if f.n, ok = r.count(); !ok || !r.word(`,"p":`) {
		return f, false
	}
	if f.previous, ok = r.quoted(isHash); !ok || !r.word(`,"t":`) {
		return f, false
	}
	if f.t, ok = r.count(); !ok {
		return f, false
	}
	if r.word(`,"tn":`) {
		f.tenant = true
		if f.tn, ok = r.count(); !ok || !r.word(`,"tp":`) {
			return f, false
		}
		if f.tp, ok = r.quoted(isHash); !ok {
			return f, false
		}
	}
	if !r.word(`},"r":`) || r.at+3 > len(entry) {
		return f, false
	}
	f.body = entry[r.at : len(entry)-1]
	return f, entry[len(entry)-1] == '}' && f.body[0] == '{' && f.body[len(f.body)-1] == '}'
}

func isLog(s string) bool { return logName(s) }

func isHash(s string) bool { return len(s) == 64 && hexSet.all(s) }

func (r *reader) quoted(good func(string) bool) (string, bool) {
	if !r.take('"') {
		return "", false
	}
	end := bytes.IndexByte(r.data[r.at:], '"')
	if end < 0 {
		return "", false
	}
	s := string(r.data[r.at : r.at+end])
	r.at += end + 1
	return s, good(s)
}

func (r *reader) count() (int64, bool) {
	v, ok := r.integer()
	n, _ := v.(int64)
	return n, ok && n >= 0 && n < math.MaxInt64
}
