// A GPIO controller of AMD whose registers are memory that the kernel is told to leave alone (see run), and whose
// interrupt is the second serial port's: what it does not do by itself, init does.
DefinitionBlock ("", "SSDT", 2, "TIDE", "GPIO", 1) {
  Scope (\_SB) {
    Device (GPI0) {
      Name (_HID, "AMDI0030")
      Name (_UID, 0)
      Name (_CRS, ResourceTemplate () {
        Interrupt (ResourceConsumer, Edge, ActiveHigh, Shared) { 3 }
        Memory32Fixed (ReadWrite, 0x10000000, 0x400)
      })
      Method (_STA) { Return (0x0F) }
    }
  }
}
